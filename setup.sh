#!/bin/sh
# Makes the virtual environment and, where root or sudo allows, installs Debian's synthesisers, ffmpeg and Chromium (340 MB;
# it prints reports as PDF, and the tests load every page in it). Called by the Makefile.
set -eu
say() { printf '%s\n' "setup: $*"; }

as_root=""
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root="sudo"; else as_root="no"; fi
fi
log="${TMPDIR:-/tmp}/setup-apt.log"
apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q "$@" >>"$log" 2>&1; }

packages="ffmpeg festival festvox-ru festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k flite espeak-ng chromium"
# A Python that was not installed by Debian brings its own venv module.
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || packages="python3-venv $packages"
if command -v apt-get >/dev/null 2>&1; then
  missing=""
  for package in $packages; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
  done
  if [ -n "$missing" ] && [ "$as_root" = no ]; then
    say "no root or sudo: the study goes on without$missing; to have them: apt-get install$missing"
  elif [ "$as_root" != no ]; then
    # The package lists are needed by the fetching of corpora too.
    if [ -z "$(find /var/lib/apt/lists -name '*Packages*' 2>/dev/null | head -n 1)" ]; then
      apt update || say "apt-get update failed: is there a network? Going on with what is here."
    fi
    if [ -n "$missing" ]; then
      say "installing$missing"
      apt install --no-install-recommends $missing || { apt update && apt install --no-install-recommends $missing; } ||
        say "some Debian packages could not be installed (see $log); the study goes on without them"
    fi
  fi
else
  say "no apt-get here: Debian's voices and corpora are skipped; use CORPUS=librispeech as the real speech"
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
  say "cannot make a virtual environment; expected the venv module (Debian: apt-get install python3-venv)"; exit 1; }
say "installing Python packages into $VENV (several GB the first time)"
"$VENV/bin/pip" install -q -e '.[test]' || {
  say "pip could not install the dependencies of pyproject.toml; is there a network?"
  say "the versions that were tested: requirements.lock"; exit 1; }
"$VENV/bin/pip" install -q -e '.[generators]' || {
  say "not every synthesiser could be installed together; trying one by one"
  "$VENV/bin/python" -c 'import tomllib
for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["generators"]: print(name)' |
    while read -r package; do
      "$VENV/bin/pip" install -q "$package" || say "skipped $package; to have it: $VENV/bin/pip install '$package'"
    done; }
