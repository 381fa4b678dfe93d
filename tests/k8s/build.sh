#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Finds or builds the programs of a real control plane: etcd, kube-apiserver, kube-proxy.
#
#   build.sh [OUT]          build what is missing into OUT (default: the cache), then list
#   build.sh --find [OUT]   list only
#
# Standard output: one `NAME=PATH` line per program found. A program comes from $KUBEBUILDER_ASSETS
# (the ecosystem's convention; it has no kube-proxy), else OUT, else it is built once from the
# published Go modules (tools/go.mod) and kept in OUT, outside the checkout, by version.
# Exit: 0 all found, 3 some left out (standard error names them and says why), 1 a build failed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
version=$(awk '$1 == "k8s.io/kubernetes" {print $2} $2 == "k8s.io/kubernetes" && NF == 3 {print $3}' "$here/tools/go.mod" | head -n 1)
find_only=false
if [ "${1:-}" = --find ]; then
    find_only=true
    shift
fi
out=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/lbagent/kubernetes/$version}

package_of() {
    case $1 in
        etcd) echo go.etcd.io/etcd/server/v3 ;;
        *) echo "k8s.io/kubernetes/cmd/$1" ;;
    esac
}

path_of() { # prints nothing when the program is nowhere
    for folder in "${KUBEBUILDER_ASSETS:-}" "$out"; do
        if [ -n "$folder" ] && [ -x "$folder/$1" ]; then
            echo "$folder/$1"
            return
        fi
    done
}

build() { # static, without paths and symbols, saying its real version
    echo "building $1 ($version): minutes on a cold cache" >&2
    stamp=k8s.io/component-base/version
    (
        cd "$here/tools"
        CGO_ENABLED=0 GOFLAGS='' GOWORK=off nice -n 10 go build -p 2 -buildvcs=false -trimpath \
            -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitTreeState=archive" \
            -o "$out/.$1.$$" "$(package_of "$1")"
    ) || return 1
    mv "$out/.$1.$$" "$out/$1"
}

build_missing() {
    mkdir -p "$out"
    exec 9>"$out/.lock"
    flock 9 # two test runs at once: the second waits and finds
    for program in etcd kube-proxy kube-apiserver; do
        [ -n "$(path_of $program)" ] || build $program || exit 1
    done
    exec 9>&-
}

if ! $find_only && command -v go >/dev/null; then
    build_missing
fi

missing=
for program in etcd kube-apiserver kube-proxy; do
    path=$(path_of $program)
    if [ -z "$path" ] && [ $program = etcd ]; then
        path=$(command -v etcd || true) # the distribution's 3.4 serves too
    fi
    if [ -n "$path" ]; then
        echo "$program=$path"
    else
        missing="$missing $program"
    fi
done
if [ -n "$missing" ]; then
    echo "left out:$missing (not in KUBEBUILDER_ASSETS, not in $out;" \
        "install Go 1.26 and run tests/k8s/build.sh to build $version once)" >&2
    exit 3
fi
