"""Pairs of models: the registry, what the command line may name, and where each pair lies.

Importing this module is quick; torch and transformers are imported when a model is converted or
loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from calibrate import convert, fetch
from calibrate.cache import (
    Progress,
    check_room,
    converted_folder,
    file_sha256,
    fill,
    folder_num_bytes,
    is_whole,
)
from calibrate.errors import UsageError, UserError
from calibrate.gguf_file import read_layout
from calibrate.loading import (
    LoadedPair,
    ModelIdentity,
    common_vocabulary,
    default_dtype,
    load_pair,
)
from calibrate.sources import (
    HUB_ID,
    GgufFile,
    HubFile,
    HubRepo,
    LocalFolder,
    Mirrors,
    ModelSpec,
    PairSpec,
    Source,
    WheelParts,
)
