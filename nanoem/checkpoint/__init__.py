"""Model and adapter folders of Hugging Face, in and out, without its libraries.

Begin with folders.py: a model folder opened and written. adapters.py does the same for PEFT's
adapter folders, config_json.py for config.json, templates.py for the tokenizer and its chat
template (jinja.py renders it), safetensors.py for the tensors themselves. Here hostile files are
refused: each reader checks what it reads, in its own functions.
"""

from nanoem.checkpoint.adapters import load_adapter, save_adapter
from nanoem.checkpoint.config_json import TORCH_DTYPES
from nanoem.checkpoint.folders import load_pretrained, open_folder, save_pretrained
from nanoem.checkpoint.safetensors import load_tensors, save_tensors
