#!/usr/bin/env bash
# Pre-train under mpirun, MPICH's, Intel's or Open MPI's, on one host or many:
#
#   launch/mpi/pretrain.sh n1,n2,n3,n4 8 --config launch/configs/llama_1.3b.yaml ...
#   launch/mpi/pretrain.sh hosts.txt 8 --config ...      # one name per line; what follows (slots=8, :8) is ignored
#
# The arguments are the hosts, the ranks on each host, then options of launch/pretrain.py. Hosts are plain names or IPv4
# addresses: no user@ (that belongs in ssh's configuration), no n[1-4], no IPv6. mpirun must reach the hosts, mostly by
# ssh, and the repository must be at the same place on all of them. Without Slurm nothing warns of a time limit: give
# --train.stop_after_seconds. The run then ends with status 75, and the same line resumes it. The script reads these
# variables:
#   MPIRUN        else mpirun
#   MPI_OPTIONS   more options of mpirun, as the cluster needs them
#   MASTER_PORT   a free port of the first host; else one drawn here
#   PYTHON        else the repository's .venv/bin/python
# NCCL and gloo find the network by themselves. If hosts have several networks and the wrong one is chosen, export
# NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME (Open MPI: and add -x NCCL_SOCKET_IFNAME to MPI_OPTIONS).
set -u

if [ $# -lt 2 ] || ! [ "$2" -gt 0 ] 2>/dev/null; then
  echo "usage: launch/mpi/pretrain.sh HOST,HOST,...|FILE RANKS_PER_HOST [options of launch/pretrain.py]" >&2
  exit 2
fi
hosts=$1 each=$2
shift 2
if [ -f "$hosts" ]; then  # a scheduler's file may name a host once per slot
  hosts="$(sed -E 's/[#\r].*//; s/^([^:]+):[0-9]+([[:space:]].*)?$/\1/' "$hosts" | awk 'NF && !seen[$1]++ { printf "%s%s", comma, $1; comma = "," }')"
fi
[ -n "$hosts" ] || { echo "error: no hosts are named." >&2; exit 2; }
[[ "$hosts" != */* ]] || { echo "error: there is no file $hosts, and no host has such a name." >&2; exit 2; }
IFS=, read -ra names <<<"$hosts,"
for name in "${names[@]}"; do
  [[ "$name" =~ ^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$ ]] || {
    echo "error: '$name' in the hosts $hosts is no host's name or IPv4 address: write every name out, as n1,n2,n3" \
      "(scontrol show hostnames 'n[1-3]' does it for Slurm's lists); a user belongs into ssh's configuration." >&2
    exit 2
  }
  [[ ",$hosts," != *",$name,"*",$name,"* && ",$hosts," != *",$name,$name,"* ]] || {
    echo "error: the host $name is named twice in $hosts: name each once; the ranks on each are the second word." >&2
    exit 2
  }
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

mpirun="${MPIRUN:-mpirun}" python="${PYTHON:-$root/.venv/bin/python}"
for program in "$mpirun" "$python"; do
  command -v "$program" >/dev/null || { echo "error: there is no $program: set MPIRUN or PYTHON." >&2; exit 2; }
done
# Only rank 0's host could look for a free port, but all ranks must know it: draw one below 32768, where the kernel
# assigns none by itself.
export MASTER_ADDR="${names[0]}" MASTER_PORT="${MASTER_PORT:-$((20000 + RANDOM % 12000))}" LAUNCH_HOSTS="$hosts"
count=$((${#names[@]} * each))

# shellcheck disable=SC2086  # MPI_OPTIONS are several words
case "$("$mpirun" --version 2>&1)" in
  *"Open MPI"* | *OpenRTE* | *PRRTE*)
    exec "$mpirun" --host "${hosts//,/:$each,}:$each" -np "$count" --map-by "ppr:$each:node" --bind-to none \
      -x MASTER_ADDR -x MASTER_PORT -x LAUNCH_HOSTS ${MPI_OPTIONS:-} "$python" -u "$root/launch/pretrain.py" "$@" ;;
  *)
    exec "$mpirun" -hosts "$hosts" -ppn "$each" -n "$count" -genv MASTER_ADDR "$MASTER_ADDR" \
      -genv MASTER_PORT "$MASTER_PORT" -genv LAUNCH_HOSTS "$hosts" ${MPI_OPTIONS:-} \
      "$python" -u "$root/launch/pretrain.py" "$@" ;;
esac
