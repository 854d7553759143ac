#!/usr/bin/env bash
# Run everything that needs a GPU at once, figures before tests: a probe of the versions and of what the head asks of
# PyTorch, the table of the head, whole training steps beside TRL, the tests that need CUDA, and those that use it if it
# is there.
#
#     COMMIT=$(git rev-parse --short HEAD) bash benchmarks/gpu_suite.sh OUT_DIR
#
# It needs torch, triton, transformers, accelerate and pytest, and no network. Peers that are pure Python can travel as
# wheels, in a folder wheels/ where the command is run. Fill it where there is a network; the wheels serve only this
# run:
#
#     pip download --no-deps -d wheels trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 datasets dill \
#         multiprocess xxhash
#
# The head and its tests need none of them; whole training steps need datasets.
#
# Every part has its time limit, and all parts together have BUDGET seconds (540). benchmarks/README.md says what fits
# into a first call of 540 and a second one of 200 seconds. A failing part stops no other. A second run with the same
# OUT_DIR does what is still missing: it repeats no part that came to its end, and the tables go on at the first case
# that they lack. Put OUT_DIR back if it was moved, and start a fresh one when the code has changed. OUT_DIR receives
# status (one line per part: name, exit code, seconds), probe.log, head.log, training.log, gluon.log and tests.log, and
# head.jsonl and training.jsonl, which belong in benchmarks/results/<machine>/. The exit code is 0 when all parts have
# ended well.
#
# SUITE_SIZE=smoke runs toy sizes, on any machine; PYTHON names the interpreter (python3).
set -u

wheels=$PWD/wheels
out=$(mkdir -p "${1:?usage: gpu_suite.sh OUT_DIR}" && realpath "$1") || exit
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
deadline=$((SECONDS + ${BUDGET:-540}))
export PYTHONUNBUFFERED=1

if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d) || exit
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# part NAME SECONDS LOG UNFINISHED COMMAND...: UNFINISHED lists the exit codes after which another call tries again.
part() {
    local name=$1 limit=$2 log=$out/$3 unfinished=" $4 " before left start rc
    shift 4
    before=$(awk -v name="$name" '$1 == name { rc = $2 } END { print rc }' "$out/status" 2>/dev/null)
    if [[ -n $before && $unfinished != *" $before "* ]]; then
        return "$before"
    fi
    left=$((deadline - SECONDS))
    if ((left < 5)); then
        echo "$name 124 0" >>"$out/status"
        return 124
    fi
    echo "== $name"
    start=$SECONDS
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee -a "$log"
    rc=${PIPESTATUS[0]}
    echo "$name $rc $((SECONDS - start))" >>"$out/status"
    return "$rc"
}

plugins=() # where they are installed: compile on many cores, and lose one test to a kernel that hangs, not all
if [[ ${SUITE_SIZE:-full} != smoke ]]; then
    "$python" -c "import xdist" 2>/dev/null && plugins+=(-n 8)
    "$python" -c "import pytest_timeout" 2>/dev/null && plugins+=(--timeout 90 --timeout-method thread)
fi

tests() { # NAME SECONDS ARGUMENTS...
    part "$1" "$2" tests.log "124 137" \
        "$python" -m pytest -q -p no:cacheprovider -W default --durations=5 --continue-on-collection-errors \
        "${plugins[@]}" "${@:3}"
}

probe() { # the head's matmuls add 16-bit products to float32 sums
    part probe 60 probe.log "124 137" "$python" -c '
import importlib, sys, torch
print("python", sys.version.split()[0])
for name in ("torch", "triton", "transformers", "datasets", "trl", "liger_kernel", "cut_cross_entropy"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "installed"))
    except ImportError as error:
        print(name, "is missing:", error)
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    a, out = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16), torch.ones(64, 64, device="cuda")
    torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    assert (out == 65).all(), out
    print("16-bit products are added to float32 sums")
'
}

peers=() variants=() # all of them; without TRL, which cannot be left out unless others are named
if [[ ${SUITE_SIZE:-full} == smoke ]]; then
    peers=(--peers PyTorch)
    variants=(--variants fastdpo TRL)
elif ! "$python" -c "import trl" 2>/dev/null; then
    peers=(--peers PyTorch "PyTorch, compiled" "PyTorch, chunked" Liger "Liger DPO" CCE)
    variants=(--variants fastdpo "fastdpo, no sharing" "fastdpo, no packing" "fastdpo, no fused head")
fi

head_table() { # CASES SECONDS
    while part head "$2" head.log "1 3 124 137" "$python" -m fastdpo bench head --cases "$1" --out "$out/head.jsonl" \
        "${peers[@]}"
        (($? == 3)); do # without the variant that ended the process
        :
    done
}

training_table() { # CASES SECONDS; it ends early, because a case begun in its last seconds would be cut off
    local left=$((deadline - SECONDS))
    local most=$((($2 < left ? $2 : left) - 10))
    part training "$2" training.log "1 3 5 124 137" "$python" -m fastdpo bench training --cases "$1" \
        --seconds "$((most > 0 ? most : 0))" --out "$out/training.jsonl" "${variants[@]}"
}

if [[ ${SUITE_SIZE:-full} == smoke ]]; then
    probe
    head_table smoke 540
    training_table smoke 540
    tests accuracy 540 tests/head/test_accuracy.py
else
    probe
    tests production 40 tests/kernels/test_production_tiles.py # it compiles most kernels, side by side
    head_table models 300
    training_table gpu 110
    part gluon 70 gluon.log "124 137" "$python" -m benchmarks.studies.gluon_forward # it may deadlock: it has never run
    mapfile -t marked < <(grep -rl --include="test_*.py" "mark\.gpu" tests)
    tests gpu 90 -m gpu "${marked[@]}"
    mapfile -t on_devices < <(grep -rl --include="test_*.py" "device: torch\.device" tests)
    tests kernels 270 -m "not gpu" "${on_devices[@]}"
fi

echo "== summary"
grep -hE "^(FAILED|ERROR)" "$out/tests.log"
grep -hs "^left out" "$out/head.log" "$out/training.log" | sort -u
awk '{ rc[$1] = $2; s[$1] += $3; if (!seen[$1]++) order[++n] = $1 }
    END { for (i = 1; i <= n; i++) { printf "%-16s exit %3d %5d s\n", order[i], rc[order[i]], s[order[i]]; bad += rc[order[i]] != 0 }
          exit bad > 0 }' "$out/status"
