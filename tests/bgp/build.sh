#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Finds or builds gobgp and gobgpd, which the interoperability tests run.
#
#   build.sh [OUT]          build what is missing into OUT (default: the cache), then list
#   build.sh --find [OUT]   list only
#
# Standard output: one `NAME=PATH` line per program. Built once from the published Go module
# (tools/go.mod, tools/go.sum) and kept outside the checkout, by version.
# Exit: 0 both found, 3 some left out (standard error says why), 1 a build failed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
version=$(awk '$1 == "require" && $2 ~ /gobgp/ {print $3} $1 ~ /gobgp\/v3/ {print $2}' "$here/tools/go.mod" | head -n 1)
find_only=false
if [ "${1:-}" = --find ]; then
    find_only=true
    shift
fi
out=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/lbagent/gobgp/$version}

if ! $find_only && { [ ! -x "$out/gobgp" ] || [ ! -x "$out/gobgpd" ]; }; then
    command -v go >/dev/null || {
        echo "gobgp is not built and Go is not installed: the GoBGP tests are left out" >&2
        exit 3
    }
    mkdir -p "$out"
    exec 9>"$out/.lock"
    flock 9 # two test runs at once: the second waits and finds
    for program in gobgp gobgpd; do
        [ ! -x "$out/$program" ] || continue
        echo "building $program $version: two minutes on a cold cache" >&2
        (
            cd "$here/tools"
            CGO_ENABLED=0 GOFLAGS='' GOWORK=off nice -n 10 go build -p 2 -buildvcs=false -trimpath \
                -ldflags '-s -w' -o "$out/.$program.$$" "github.com/osrg/gobgp/v3/cmd/$program"
        ) || exit 1
        mv "$out/.$program.$$" "$out/$program"
    done
    exec 9>&-
fi

for program in gobgp gobgpd; do
    if [ ! -x "$out/$program" ]; then
        echo "$program is not built: run tests/bgp/build.sh (needs Go)" >&2
        exit 3
    fi
    echo "$program=$out/$program"
done
