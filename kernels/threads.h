// A thread pool that sleeps when it has no work: on a shared machine a spinning one slows everybody, itself included.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace mixtools {

// A loop over [0, count), whose items the caller and its helpers take one by one.
struct Job {
    void (*body)(const void* context, int64_t item);
    const void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
    int64_t wanted = 0;  // helpers that may still join; guarded by Pool::mutex, as is the next
    int64_t active = 0;  // helpers at work

    void work() {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, item);
    }
};

class Pool {
  public:
    void run(Job& job, int64_t threads) {
        threads = std::min(threads, job.count);
        if (threads > 1) invite(job, threads - 1);
        job.work();
        if (threads > 1) dismiss(job);
    }

  private:
    void invite(Job& job, int64_t helpers) {
        std::lock_guard<std::mutex> lock(mutex);
        job.wanted = helpers;
        jobs.push_back(&job);
        try {
            for (; started < helpers; started++) std::thread(&Pool::help, this).detach();
        } catch (const std::system_error&) {
            // The system grants no more threads; those at hand, at worst the caller alone, do all the items.
        }
        wake.notify_all();
    }

    void dismiss(Job& job) {
        std::unique_lock<std::mutex> lock(mutex);
        if (job.wanted > 0) jobs.erase(std::find(jobs.begin(), jobs.end(), &job));
        left.wait(lock, [&] { return job.active == 0; });
    }

    void help() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return !jobs.empty(); });
            Job& job = *jobs.front();
            job.active++;
            if (--job.wanted == 0) jobs.pop_front();
            lock.unlock();
            job.work();
            lock.lock();
            if (--job.active == 0) left.notify_all();
        }
    }

    std::mutex mutex;
    std::condition_variable wake, left;
    std::deque<Job*> jobs;  // those that still want helpers
    int64_t started = 0;
};

// Never destroyed: helpers sleep in it until the process ends. A forked child has none of its parent's
// helpers, and perhaps a locked mutex, so it makes a pool of its own.
inline Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
    Pool* found = current.load();
    if (!found) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(found, fresh))
            found = fresh;
        else
            delete fresh;
    }
    return *found;
}

// body(item) for each item in [0, count), on at most `threads` threads. Which thread takes which item is
// not determined: a body writes what belongs to its item only.
template <typename Body> void parallel_for(int64_t count, int64_t threads, const Body& body) {
    Job job{[](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body, count};
    pool().run(job, threads);
}

}  // namespace mixtools
