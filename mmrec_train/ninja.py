"""The program that compiles DeepSpeed's operators."""

import os
import sys
from pathlib import Path


def prefer_own_ninja() -> None:
    """Puts the folder of this Python first on the PATH, where torch looks for ninja; pip installs it there.

    Without it nothing compiles, and another ninja than the one before compiles all operators anew, in every rank.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"
