# Sourced by the other scripts: `setup EXTRA` installs mixtools[EXTRA] ("" for what running it needs) into .venv of
# this repository, once; it leaves PYTHON set to that environment's Python. Needs Python 3.10+ and a C++ compiler.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
STAMP=$VENV/mixtools-installed
TRITON=$ROOT/.venv-triton

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# What decides how the package is installed: other files are used where they lie.
fingerprint() {
    "$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / "pyproject.toml", root / "scripts/constraints.txt"]
files += sorted(path for path in (root / "kernels").rglob("*") if path.is_file())
digest = hashlib.sha256((sys.version + str(root)).encode())
# the modules' names too: an editable installation finds those that were there when it was made
digest.update("\n".join(sorted(map(str, (root / "mixtools").rglob("*.py")))).encode())
for path in files:
    digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

base_python() {
    local candidate
    for candidate in ${MIXTOOLS_PYTHON:-python3.11 python3 python3.12 python3.10}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "Python 3.10 or newer with its venv module is needed; name one in MIXTOOLS_PYTHON."
}

setup() {
    local extra=$1 python now had
    mkdir -p "$VENV"
    # Two scripts started together install once: the second waits.
    exec 9>"$VENV/setup.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        python=$(base_python) || exit 1
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || die "could not make $VENV"
    fi
    now=$(fingerprint) || exit 1
    had=$(cat "$STAMP" 2>/dev/null)
    # any extra includes what running needs
    if [[ $had != "$now $extra" && ! ($extra == "" && $had == "$now "*) ]]; then
        install "$extra"
        printf '%s' "$now $extra" >"$STAMP"
    fi
    exec 9>&-
}

install() {
    local pip=("$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check -c "$ROOT/scripts/constraints.txt")
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
        die "A C++17 compiler is needed to build the kernels: install g++ or clang++, or name one in CXX."
    rm -f "$STAMP" # an interrupted installation is no installation
    # torch by itself first: its version alone decides whether gigabytes of CUDA libraries come along
    echo "installing torch"
    "${pip[@]}" torch || die "could not install torch"
    echo "installing mixtools${1:+[$1]}"
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)} "${pip[@]}" -e "$ROOT${1:+[$1]}" || die "could not install mixtools; the lines above say why"
}

# Puts Triton into a folder of its own, once: only what names the folder in PYTHONPATH sees it, and torch's build for
# CPUs, which has no use for it, does not. After `setup`.
setup_triton() {
    local stamp=$TRITON/mixtools-installed now version
    version=$(sed -n 's/^triton==//p' "$ROOT/scripts/constraints.txt")
    now="triton $version $("$PYTHON" -c 'import sys; print(sys.version)')" || exit 1
    mkdir -p "$TRITON"
    exec 8>"$TRITON.lock"
    if command -v flock >/dev/null; then flock 8; fi
    if [[ $(cat "$stamp" 2>/dev/null) != "$now" ]]; then
        echo "installing triton $version"
        rm -rf "$TRITON"
        "$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --target "$TRITON" \
            "triton==$version" || die "could not install triton"
        printf '%s' "$now" >"$stamp"
    fi
    exec 8>&-
}
