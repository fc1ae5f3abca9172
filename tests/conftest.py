"""Tests run from the repository's root, on one thread, without a network.

Their models are tiny: two threads wait for each other longer than they compute.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")            # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
