#!/bin/sh
# Chats with the demo model, from nothing: sh examples/quickstart.sh. With another model: sh examples/quickstart.sh -m model.l3
# Installs a compiler if there is none (Debian, Ubuntu), builds chat with one command, runs it. Arguments go to chat (--help).
# Works with a pipe too: printf 'Hello\n' | sh examples/quickstart.sh
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
say() { printf '%s\n' "$*" >&2; }

compiler=${CXX:-g++}
if ! command -v "$compiler" >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then root=
    elif command -v sudo >/dev/null 2>&1; then root=sudo
    else root=none; fi
    if [ "$root" = none ] || ! command -v apt-get >/dev/null 2>&1; then
        say "quickstart: no C++ compiler (found no $compiler, expected g++ 11 or later). Install it (apt-get install g++) and run this again."
        exit 1
    fi
    say "Installing g++ ..."
    { $root apt-get update -q && DEBIAN_FRONTEND=noninteractive $root apt-get install -q -y --no-install-recommends g++ libedit-dev; } </dev/null >&2
    compiler=g++
fi

chat=$source/build/quickstart/chat
mkdir -p "${chat%/*}"
if [ ! -x "$chat" ] || [ -n "$(find "$source/llama3.hpp" "$source/examples" -newer "$chat")" ]; then
    editing=
    if printf '#include <histedit.h>\n' | "$compiler" -x c++ -fsyntax-only - 2>/dev/null; then editing="-DLLAMA3_LIBEDIT -ledit"; fi
    say "Building chat (about half a minute) ..."
    # The libraries come after the source; $editing is meant to be split.
    "$compiler" -std=c++20 -O2 -fopenmp -I"$source" -DLLAMA3_IMPLEMENTATION -DLLAMA3_SOURCE_DIR="\"$source\"" \
        "$source/examples/chat.cpp" -o "$chat.new" $editing >&2
    mv "$chat.new" "$chat"
fi
exec "$chat" "$@"
