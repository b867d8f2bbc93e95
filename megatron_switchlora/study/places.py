"""Where the checkout keeps what studies start and read: scripts, settings, configurations, results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
