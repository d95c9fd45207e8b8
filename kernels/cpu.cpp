extern "C" __attribute__((visibility("default"))) int mixtools_abi_version() { return 1; }
