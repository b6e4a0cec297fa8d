#!/bin/sh
# Creates the secrets of compose.yaml in `secrets` beside this script; those that exist stay.
# Compose mounts each file as it is, so each container's user must be able to read it: the directory is private instead.
set -eu
directory="$(cd "$(dirname "$0")" && pwd)/secrets"
install -d -m 0700 "$directory"
for name in admin-key grafana-password; do
    file="$directory/$name"
    if [ ! -s "$file" ]; then
        # Under another name first: a disk that is full leaves no empty secret.
        secret="$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')"
        printf '%s\n' "$secret" >"$file.new"
        chmod 0444 "$file.new"
        mv -f "$file.new" "$file"
    fi
done
