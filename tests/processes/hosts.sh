# Two hosts with two processes each: network namespaces joined by a cable, inside of namespaces that need no rights.
# Called as: unshare -rnm bash hosts.sh PYTHON SCRIPT ARGUMENTS...
set -e
mount -t tmpfs tmpfs /run
for host in 1 2; do ip netns add "host$host"; done
ip link add cable1 type veth peer name cable2
for host in 1 2; do
    ip link set "cable$host" netns "host$host"
    ip -n "host$host" addr add "10.9.0.$host/24" dev "cable$host"
    ip -n "host$host" link set "cable$host" up
    ip -n "host$host" link set lo up
done
python=$1
shift
start() {
    GLOO_SOCKET_IFNAME="cable$1" ip netns exec "host$1" "$python" -m torch.distributed.run --nnodes 2 \
        --node-rank "$(($1 - 1))" --nproc-per-node 2 --master-addr 10.9.0.1 --master-port 29500 "${@:2}"
}
start 1 "$@" &
start 2 "$@" &
wait -n
wait -n
