#!/bin/sh
# Everything that only a GPU can show, in one run of less than nine minutes:
#   benchmarks/gpu/suite.sh OUT [--dry-run] [--sections a,b,...]
# OUT/gpu.json gets machine, versions, commit and every figure, section by section, so that a run that is cut
# short leaves what it had. PYTHON names the interpreter of an environment with quanttune[test].
# --dry-run: tiny shapes in Triton's interpreter on the CPU, to see that all of it runs.
set -eu
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
case " $* " in *" --dry-run "*) export TRITON_INTERPRET=1 ;; esac
export PYTHONPATH="$(cd "$(dirname "$0")/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.suite "$@"
