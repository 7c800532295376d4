"""Shared code of the study: one-class speech deepfake detection by feature pyramid matching."""

import os

# Threads that wait by spinning stall each other where another process shares the cores: 30 times slower on two.
# The OpenMP runtime reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
