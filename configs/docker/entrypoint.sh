#!/bin/sh
# What a container runs. `serve` (the default): packs MODEL as NAME and serves it until SIGTERM. `--cpu`: prints what
# tells kinds of CPU apart. Anything else is run as it is, as Kubernetes' init container does.
#
# NAME, MODEL, TP, DTYPE, DEVICE as in the Makefile; DRAIN: seconds that running requests have; TOKENS=off: calls from
# outside need no token, for networks that only a balancer reaches.
set -eu

cpu() {
    grep -m 1 -E '^(flags|Features)' /proc/cpuinfo | sha256sum | cut -c 1-16
}

# Operations compiled with -march=native run on this kind of CPU alone.
prepare_operations() {
    [ -d "$TORCH_EXTENSIONS_DIR" ] && return
    if [ -d "/opt/torch_extensions/$(cpu)" ]; then
        cp -R -p "/opt/torch_extensions/$(cpu)" "$TORCH_EXTENSIONS_DIR"
    fi
    python -m scripts.pack.build_ops --device cpu
}

if [ "${1:-}" = --cpu ]; then
    cpu
    exit
fi
mkdir -p "$HOME"
if [ "$DEVICE" = cpu ]; then
    prepare_operations
fi
if [ "${1:-}" != serve ]; then
    exec "$@"
fi
python -m scripts.pack --name "$NAME" --model "$MODEL" --tp "$TP" --device "$DEVICE" --dtype "$DTYPE" \
    --model-store /work/model-store
if [ "${TOKENS:-on}" = off ]; then
    set -- --no-tokens
else
    set --
fi
exec python -m scripts.serve run --run-dir /work/run --name "$NAME" --archive "/work/model-store/$NAME.mar" \
    --port 8080 --host 0.0.0.0 --drain-s "$DRAIN" --timeout-s 1800 "$@"
