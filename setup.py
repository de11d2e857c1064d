"""Metadata of segfleet. The folders at the root are the import package: `models/` is
`segfleet.models`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("cli", "core", "models", "pipeline", "preprocess", "slurm", "sweeps")
HERE = Path(__file__).parent

packages = [
    f"segfleet.{name}"
    for room in ROOMS
    for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))
]

setup(
    name="segfleet",
    version="0.1.0",
    description="Train medical image segmentation networks at scale: shards, exact resume, SLURM, "
    "sweeps, honest scores",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="medical imaging, segmentation, deep learning, SLURM, reproducibility",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"segfleet.{room}": room for room in ROOMS},
    package_data={
        "segfleet.pipeline": [
            "recipes/*.yaml",
            "sources.json",
            "data/*.cpp",
            "reports/templates/*",
        ],
        "segfleet.models": ["scan/*.cpp"],
        "segfleet.sweeps": ["spaces/*.yaml", "results/templates/*"],
    },
    entry_points={"console_scripts": ["segfleet = segfleet.cli.main:main"]},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8,<0.20",
        "submitit>=1.5.4,<1.6",
        "ray[tune]>=2.52,<3",
        "h5py>=3.15",
        "zarr>=3.1,<4",
        "numcodecs>=0.16,<0.18",
        "einops>=0.8",
        "tensorboardX>=2.6.2.2",
        "numpy>=2",
        "scipy>=1.15",
        "surface-distance-based-measures==0.1",
        "pydantic>=2.8",
        "typer>=0.20",
        "rich>=13",
        "ruamel.yaml>=0.18",
        "nibabel>=5.2",
        "SimpleITK>=2.5.6",
        "pillow>=10.4",
        "tifffile>=2026.3.3",
        "imagecodecs>=2026.3.6",
        "pydicom>=3",
        "safetensors>=0.5",
        "google-crc32c>=1.6",
        "optuna>=5",
        "psutil>=6",
        "filelock>=4.2",
        "Jinja2>=3.1",
    ],
    extras_require={
        "dicom": ["highdicom>=0.28"],  # labels out as DICOM SEG
        "mamba": [
            "mamba-ssm>=2.3.2.post1; platform_system=='Linux'",
            "causal-conv1d>=1.4; platform_system=='Linux'",
        ],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3.13"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5"],
        "dev": [
            "pytest>=8.4",
            "pyyaml>=6",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.13",
            "triton; platform_system=='Linux'",  # torch decides the version
            "hdf5plugin>=5",
            "build>=1.2",
            "hypothesis>=6.100",
            "highdicom>=0.28",
            "pynrrd>=1.1.3",
            "onnx>=1.17",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
            "ome-zarr-models>=1",
            "wandb>=0.19",
            "mlflow-skinny>=3.13",
            "scikit-image>=0.25",
        ],
    },
)
