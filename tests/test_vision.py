"""torchvision and timm, imported beside any torch; in fresh processes, since an import happens once."""

import subprocess
import sys


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_operators_are_declared_only_where_torchvision_lacks_them(tmp_path):
    """With three torchvisions: one fails for another reason, one loads, and one lacks both operators."""
    lacking = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, iou_threshold: dets)
kind = "lacking"
"""
    loading = "import torch\ntorch.library.define('torchvision::own', '() -> ()')\nkind = 'loading'\n"
    sources = {"failing": "raise RuntimeError('made for another CUDA')", "loading": loading, "lacking": lacking}
    for kind, source in sources.items():
        (tmp_path / kind / "torchvision").mkdir(parents=True)
        (tmp_path / kind / "torchvision" / "__init__.py").write_text(source)
    code = f"""
import sys, torch
from basis.vision import import_torchvision
for kind in {list(sources)}:
    sys.path.insert(0, {str(tmp_path)!r} + "/" + kind)
    sys.modules.pop("torchvision", None)
    try:
        found = import_torchvision().kind
    except RuntimeError as error:
        found = error
    print(found, [name for name in ("nms", "qnms", "own") if hasattr(torch.ops.torchvision, name)])
"""
    assert python(code) == ["made for another CUDA []", "loading ['own']", "lacking ['nms', 'qnms', 'own']"]
