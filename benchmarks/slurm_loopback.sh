#!/usr/bin/env bash
# A sweep of 2 x 2 cells on a real Slurm of one node, this machine: victims first, the cells by job dependency. As root, on Debian with
#   apt-get install slurm-wlm munge && pip install -e ".[slurm]"
# Usage: benchmarks/slurm_loopback.sh [RUNS_DIR] [further options]. It starts daemons of its own under /tmp/slurm-loopback and ends them.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
runs=${1:-/tmp/slurm-loopback/runs}
shift || true
work=/tmp/slurm-loopback
mkdir -p "$work"/{state,spool,log} /run/munge
host=$(hostname -s)

cat > "$work/slurm.conf" <<END
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd.log
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF="$work/slurm.conf"

[ -f /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none; }
chown munge:munge /etc/munge/munge.key /run/munge && chmod 400 /etc/munge/munge.key && chmod 755 /run/munge
runuser -u munge -- munged --foreground > "$work/log/munged.log" 2>&1 &
daemons=$!
slurmctld -D > "$work/log/slurmctld.out" 2>&1 &
daemons="$daemons $!"
slurmd -D > "$work/log/slurmd.out" 2>&1 &
daemons="$daemons $!"
trap 'kill $daemons 2> /dev/null || true; wait 2> /dev/null || true' EXIT
for _ in $(seq 30); do sinfo -h -o %T 2> /dev/null | grep -q idle && break; sleep 1; done
sinfo

started=$(date +%s)
(cd "$work" && python "$here/defend.py" -m hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=null \
  dataset=digits trainer=exact training.epochs=2 model.width=4 clean_per_class=4 figures=false defense=static_clip \
  defense.detector.folds=0 attack.min_success=0 defense.start.share=0.3,0.5 seed=0,1 logger=none runs_dir="$runs" "$@")
echo "the sweep took $(($(date +%s) - started)) s"
sacct=$(scontrol show job | grep -E "JobId=|Dependency=|JobState=" || true)
echo "$sacct"
python -m marginclip status "$runs"
