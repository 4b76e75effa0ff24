"""What is uploaded holds all that an installation needs: ``python .ci/archives.py SDIST.tar.gz WHEEL.whl``."""
import sys
import tarfile
import zipfile

sdist, wheel = sys.argv[1:]
with tarfile.open(sdist) as archive:
    source = {name.partition("/")[2] for name in archive.getnames()}
with zipfile.ZipFile(wheel) as archive:
    built = archive.namelist()
missing = {"csrc/cpu/isa.inl", "csrc/cuda/plan.cu", "setup.py", "README.md", "tests/conftest.py"} - source
missing |= {"sparse_stgcn/py.typed", "sparse_stgcn/kernels/README.md", "sparse_stgcn/layouts/coco.yaml"} - set(built)
if not any(name.startswith("sparse_stgcn/_native.") for name in built):
    missing.add("sparse_stgcn/_native")
if missing:
    sys.exit(f"Not in the archives: {', '.join(sorted(missing))}")
