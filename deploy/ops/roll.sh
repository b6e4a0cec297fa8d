#!/bin/sh
# Quantize a recipe, report, roll out: for cron and CI. Exit codes are those of the quantgate commands:
# 0 done, 1 failed, 2 usage or configuration, 3 a gate said no, 4 another rollout of the alias is active.
#
#     roll.sh RECIPE VARIANT_DIRECTORY ALIAS VARIANT [OPTIONS OF `quantgate rollout start`]
#
# VARIANT is the name that the configuration has for the directory; --config FILE is passed on.
set -eu
if [ "$#" -lt 4 ]; then
    echo "usage: roll.sh RECIPE VARIANT_DIRECTORY ALIAS VARIANT [rollout options]" >&2
    exit 2
fi
recipe=$1 directory=$2 alias=$3 variant=$4
shift 4
[ -e "$directory/manifest.json" ] || quantgate quantize --recipe "$recipe" --out "$directory"
quantgate variants report "$directory" --out "$directory.html" >&2
exec quantgate rollout start "$alias" "$variant" --wait --reason "roll.sh $recipe" "$@"
