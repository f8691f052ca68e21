"""Our training step (GRIT on) against the HF Trainer with PEFT LoRA and AdamW, on the SmolVLM-256M shape.

Both arms train the same layers on the same rows in the same order, one process each for memory and one
process with the arms taking turns for time:

    python -m benchmarks.training_step            # writes benchmarks/results/training_step.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.measure import interleave, paired_ratio, write_result
from benchmarks.smolvlm_shape import write_model, write_rows
from grit_core.config import ModelGRITConfig, ModalityConfig
from grit_core.config.training import TrainingConfig
from grit_core.data import ChatDataset
from grit_core.events import StepCompleted
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.plan import plan_adaptation
from grit_core.training import train
from grit_core.training_job import TrainingJob

RANK = 16
