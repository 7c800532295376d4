#!/bin/bash
# Trains the paper preset on several machines of a SLURM cluster and scores a test corpus with what was trained:
#
#     sbatch examples/slurm.sh            from the project's folder, after `make setup`
#
# All machines must see this folder (one shared file system). A job that is stopped, at its time limit or by a failing
# node, goes on where it was when it is submitted again: training from its last checkpoint, scoring from its last block.
# Sizes to change: nodes, GPUs a node, and CORPORA. training.batch must be a multiple of nodes x GPUs.
#SBATCH --job-name=speech-pyramid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail

CORPORA="${CORPORA:-/data}"
PYTHON="${PYTHON:-.venv/bin/python}"
GPUS="${SLURM_GPUS_ON_NODE:-4}"
NODES="${SLURM_NNODES:-1}"
MAIN="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1 || true)"
SCORES=runs/paper/asvspoof2019_la.tsv
export OMP_NUM_THREADS=4

# One launcher on every node, one process on every GPU. Scoring runs on the CPUs of the same processes.
launch() {
  srun --kill-on-bad-exit=1 bash -c '
    exec "$0" -m accelerate.commands.launch --multi_gpu --num_machines "$1" --num_processes "$2" \
      --machine_rank "$SLURM_NODEID" --main_process_ip "$3" --main_process_port 29500 --mixed_precision no \
      --dynamo_backend no "${@:4}"' \
    "$PYTHON" "$NODES" "$((NODES * GPUS))" "${MAIN:-localhost}" "$@"
}

# What it will take, before anything starts; refuses where the disk is too small.
"$PYTHON" -m lib study --preset paper --plan

# accelerate launch -m lib train ...
launch -m lib train --preset paper --experiment multi \
  --set "data.train=librispeech@train:$CORPORA/LibriSpeech" \
  "data.validation=librispeech@validation:$CORPORA/LibriSpeech" \
  "data.test=asvspoof2019_la:$CORPORA/LA+in_the_wild:$CORPORA/release_in_the_wild" \
  "data.single=ljspeech:$CORPORA/LJSpeech-1.1+wavefake:$CORPORA/WaveFake" training.precision=bf16 run.workers=6

# The manifest of the test corpus, its headers checked once.
"$PYTHON" -m lib data --corpus asvspoof2019_la --root "$CORPORA/LA" --check --out runs/paper/asvspoof2019_la.parquet

# Every process scores its share of the blocks. The first one merges them, checks that every clip is there once, and
# writes $SCORES. Exit code 1 says that some clips could not be scored; they are listed in $SCORES.unscored.csv.
DETECTOR="$(ls -td runs/paper/detectors/multi-* | head -n 1)"
launch -m lib score --manifest runs/paper/asvspoof2019_la.parquet --detector "$DETECTOR" --out "$SCORES" \
  --form asvspoof2021 || [ -s "$SCORES" ]

# The protocol of the evaluation is the key of its own clips.
"$PYTHON" -m lib data --corpus asvspoof2019_la --root "$CORPORA/LA" --out runs/paper/asvspoof2019_la_key.csv
"$PYTHON" -m lib evaluate "$SCORES" runs/paper/asvspoof2019_la_key.csv --json runs/paper/asvspoof2019_la.json \
  --det runs/paper/asvspoof2019_la.png
