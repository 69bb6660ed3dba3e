#!/usr/bin/env bash
# The first command on a machine with a GPU: some eight minutes that show what works, what is wrong, and how fast it is. It never
# stops at a failure, and writes all that it finds into one folder: a log a step, and `summary.log`. Cases that take minutes each
# (`context`, `qwen3-8b-offload`, those with the peer) are not part of it.
#
#   ./gpu-first.sh [FOLDER [options of gpu]]
#
# It is part of the folder that `npm run build:bench` builds. FIRST_SECONDS bounds all of it (480); FIRST_CASES and
# FIRST_PROFILED name other cases. NVIDIA's tools are taken from PATH, else from CUDA_HOME (/usr/local/cuda). Without a GPU:
#   bench/gpu-first.sh found --device cpu --rehearse
set -u
out=${1:-gpu-first}
shift || true
options=("$@")
here=$(cd "$(dirname "$0")" && pwd)
gpu=${GPU:-$here/gpu}
seconds=${FIRST_SECONDS:-480}
mkdir -p "$out" || exit 1
: > "$out/summary.log"

left() { echo $((seconds - SECONDS)); }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, or as many as are left.
step() {
	local name=$1 limit=$2 begin=$SECONDS code
	shift 2
	if [ "$(left)" -lt 10 ]; then
		echo "$name: skipped, no time is left" | tee -a "$out/summary.log"
		return 1
	fi
	[ "$limit" -gt "$(left)" ] && limit=$(left)
	timeout -k 5 "$limit" "$@" > "$out/$name.log" 2> "$out/$name.err"
	code=$?
	echo "$name: exit $code, $((SECONDS - begin)) s" | tee -a "$out/summary.log"
	[ $code -ne 0 ] && tail -n 3 "$out/$name.err" | sed 's/^/    /' | tee -a "$out/summary.log"
	return $code
}

# bench NAME LIMIT WORDS...: the bench with the options of all steps. A GPU that fails is asked again, waiting for each operation.
bench() {
	local name=$1 limit=$2
	shift 2
	step "$name" "$limit" "$gpu" "$@" --budget "$limit" --python none "${options[@]}" && return
	grep -q "ARL_DEVICE" "$out/$name.err" && ARL_CUDA_SYNC=1 step "$name-sync" 60 "$gpu" "$@" --budget 60 --python none "${options[@]}"
}

# with NAME LIMIT TOOL WORDS...: a step by one of NVIDIA's tools, which the machine may lack.
with() {
	local name=$1 limit=$2 tool
	if ! tool=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v "$3"); then
		echo "$name: skipped, there is no $3" | tee -a "$out/summary.log"
		return
	fi
	shift 3
	step "$name" "$limit" "$tool" "$@"
}

machine() {
	date -u
	uname -a
	for command in "nvidia-smi" "nvidia-smi -q -d CLOCK,POWER,PERFORMANCE" "nvcc --version" "compute-sanitizer --version" \
		"ncu --version" "python3 -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'" "free -g"; do
		echo "== $command"
		sh -c "$command" 2>&1
	done
	"$gpu" --list
}

step machine 60 bash -c "$(declare -f machine); gpu='$gpu'; machine"
bench attention-cudnn 60 --attention cudnn --only attention
bench checks 150 --keep-going --attention auto --only leaves,golden,scale,model --shapes 10
cases=${FIRST_CASES:-qwen2.5-0.5b,qwen2.5-0.5b-llmq,qwen3-0.6b,qwen3-1.7b,qwen3-4b,qwen3-0.6b-8k,loss}
profiled=${FIRST_PROFILED:-qwen3-0.6b,qwen2.5-0.5b}
for attention in own auto; do
	bench "profile-$attention" 60 --part checked --profile --attention $attention --only "$profiled"
	bench "times-$attention" 120 --part checked --keep-going --attention $attention --only "$cases" --steps 4
done
for tool in memcheck racecheck; do
	with "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu" --only leaves --shapes 1 "${options[@]}"
done
with ncu 90 ncu --clock-control none --set basic -k "regex:attention_(forward|backward)|cross_entropy" -c 12 \
	"$gpu" --part checked --profile --only qwen3-0.6b --python none "${options[@]}"
echo "all of it is in $out"
