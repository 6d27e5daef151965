"""What the first cell of a notebook runs on Colab, in the clone of the book.

It installs the package and the small packages that are missing, and never touches the torch or numpy that is there.
"""

import importlib.util
import os
import subprocess
import sys

import torch

small = ("filelock", "jinja2", "safetensors", "tqdm")
missing = [name for name in small if importlib.util.find_spec(name) is None]
pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
subprocess.run([*pip, *missing, "--editable", os.getcwd()], check=True)
sys.path.insert(0, os.getcwd())
if torch.cuda.is_available():
    print("This runtime has a GPU:", torch.cuda.get_device_name())
else:
    print(
        "This runtime has no GPU: everything works, but little can be trained here. To train more, open the\n"
        "menu Runtime > Change runtime type, choose T4 GPU, press Save and run this cell again."
    )
