"""Compile every source file with the Python that runs this, and write nothing: does the syntax hold on this version?"""

import sys
from pathlib import Path

files = [path for folder in sys.argv[1:] for path in sorted(Path(folder).rglob("*.py"))]
for path in files:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
print(f"Python {sys.version_info[0]}.{sys.version_info[1]}: {len(files)} files compile")
