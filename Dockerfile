# The Python that the results were made with. CUDA comes with torch's wheel, the driver from the host's NVIDIA
# container toolkit (`--gpus all`), so one image serves GPU and CPU.
FROM python:3.11-slim-bookworm

# Only the tests want these: OpenCV links to them
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

# Not root. With `--user` the user may be anyone, so anyone may write runs, which `-v "$PWD/runs:/app/runs"` covers
RUN useradd --uid 1000 player && mkdir --mode=1777 runs
COPY README.md vae_ppo.py test_vae_ppo.py ./
USER player

# Such a user has no home: caches go to /tmp
ENV HOME=/tmp PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["python", "vae_ppo.py"]
