#!/usr/bin/env bash
# A real Slurm on this one machine: runs a study of two seeds through Snakemake's slurm executor, kills a job, resumes, and
# compares the tables with a local run. Not part of `make test`. Needs root, Debian's slurm-wlm and munge, and the extra
# "cluster":   apt-get install slurm-wlm munge && pip install -e .[cluster] && tests/cluster/run.sh
# It fails when a finished step is repeated, also one that finished while Snakemake was dead.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
WORK=${WORK:-$(mktemp -d /tmp/nt-slurm-XXXX)}
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

for tool in slurmctld slurmd munged sbatch; do
  command -v $tool >/dev/null || { echo "error: $tool is missing: apt-get install slurm-wlm munge"; exit 1; }
done

pids=()
stop() { rm -f /etc/slurm/slurm.conf; kill "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null || true; }
trap stop EXIT

# ---- munge, slurmctld and slurmd on loopback, all state in $WORK
# Jobs do not inherit SLURM_CONF, so the configuration is linked to where Slurm looks; an existing one is not touched.
conf=/etc/slurm/slurm.conf
if [ -e $conf ] && [ ! -L $conf ]; then echo "error: $conf is there: this machine has a Slurm of its own"; exit 1; fi
host=$(hostname -s)
mkdir -p "$WORK"/{state,spool,run}
chmod 755 "$WORK"
id munge >/dev/null
install -d -o munge -g munge -m 755 /run/munge
[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key 2>/dev/null; }
chown munge:munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
pgrep -x munged >/dev/null || { su -s /bin/sh munge -c munged; pids+=("$(pgrep -x munged)"); }
cat >"$WORK/slurm.conf" <<CONF
ClusterName=toy
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/run/slurmctld.pid
SlurmdPidFile=$WORK/run/slurmd.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$(free -m | awk '/Mem:/ {print int($2 * 0.9)}') State=UNKNOWN
PartitionName=toy Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /etc/slurm && ln -sfn "$WORK/slurm.conf" $conf
slurmctld -D >"$WORK/slurmctld.out" 2>&1 & pids+=($!)
slurmd -D >"$WORK/slurmd.out" 2>&1 & pids+=($!)
for _ in $(seq 60); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 0.5; done
sinfo

# ---- the toy study of tests/test_batch_faults.py, twice
"$PYTHON" - "$WORK" <<'PY'
import sys
from pathlib import Path
from tests.study.test_batch_faults import make_project, order
for name in ("local", "slurm"):
    make_project(Path(sys.argv[1]) / name)
order(Path(sys.argv[1]) / "slurm", _01="wait")
PY
(cd "$WORK/local" && "$PYTHON" -m nt_utils.study.batch study --studies toy --seeds "0 1" --cores 2)

here=$PWD
toy=$WORK/slurm
snakemake() { (cd "$toy" && exec "$PYTHON" -m snakemake --profile "$here/nt_utils/study/batch/profiles/slurm" --config studies=toy seeds=0,1 --latency-wait 5 \
  --slurm-keep-successful-logs --slurm-status-command squeue --slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 2 "$@"); }
fail() { echo "FAILED: $*"; for log in "$WORK"/*.log; do echo "-- $log"; tail -n 25 "$log"; done; exit 1; }
until_() { for _ in $(seq 300); do eval "$1" && return; sleep 0.5; done; fail "waited too long for: $1"; }
finished() { [ -s "$toy/trace" ] && sort "$toy/trace" | uniq -c | awk '{print $2 " x" $1}' | xargs; }
steps() { grep -E "steps \(|Nothing to be done" "$1" | tail -1 || true; }

echo "== 1. a job is killed"
snakemake --retries 0 >"$WORK/first.log" 2>&1 & first=$!
until_ '[ -s "$toy/waiting-01" ]'
squeue -o "%.6i %.10T %k"
killed=$(squeue -h -t running -o "%i %k" | awk '/01_second/ {print $1; exit}')
[ -n "$killed" ] || fail "no job of 01_second is running"
scancel --signal=KILL --full "$killed"
until_ '! squeue -h -o %i | grep -qx $killed'
rm "$toy/fault-01"
wait $first && fail "the first run did not notice its killed job"
echo "job $killed killed; $(steps "$WORK/first.log"); finished so far: $(finished)"

echo "== 2. the same command goes on; then Snakemake itself is killed (kill -9) while a job runs"
printf wait >"$toy/fault-06"
rm -f "$toy"/waiting-*
snakemake >"$WORK/second.log" 2>&1 & second=$!
until_ '[ -s "$toy/waiting-06" ]'
kill -9 $second
wait $second 2>/dev/null || true
rm "$toy/fault-06"
until_ '[ -z "$(squeue -h)" ]'
echo "Snakemake killed; its job went on; finished so far: $(finished)"

echo "== 3. the same command, after Snakemake's own lock is taken away"
snakemake --unlock >"$WORK/unlock.log" 2>&1 || fail "unlock"
snakemake >"$WORK/third.log" 2>&1 || fail "the third run"
steps "$WORK/third.log"
echo "== 4. once more"
snakemake >"$WORK/fourth.log" 2>&1 || fail "the fourth run"
steps "$WORK/fourth.log"

echo "finished steps: $(finished)"
expected=$(printf '%s-seed-%s x1\n' 00 0 00 1 01 0 01 1 06 0 06 1 | xargs)
[ "$(finished)" = "$expected" ] || fail "a finished step was repeated or one is missing; expected: $expected"
for seed in 0 1; do
  diff -r "$WORK/local/runs/toy/seed-$seed/tables" "$toy/runs/toy/seed-$seed/tables" || fail "the tables differ"
done
echo "ok: no finished step was repeated; the tables of the cluster and of the local run are the same"
