#!/bin/sh
# Adds the user of all images, 10001, with the directories that it writes to: `add-user.sh [ROOT]`.
# The number is fixed, so that `runAsNonRoot` can check it and volumes keep their owner. The name is for programs that
# look their user up, such as torch.
set -eu
root=${1:-}
groupadd ${root:+--prefix "$root"} --gid 10001 quantgate
useradd ${root:+--prefix "$root"} --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/quantgate \
    --shell /usr/sbin/nologin quantgate
# State database and replica logs; caches of the engine.
install -d -o 10001 -g 10001 -m 0750 "$root/var/lib/quantgate" "$root/var/cache/quantgate"
