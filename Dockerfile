# A server of one model on one NVIDIA GPU:
#
#   docker build -t quantspec .
#   docker run --gpus all -p 8000:8000 -v ~/.cache/huggingface:/cache quantspec MODEL
#
# The base has CUDA, torch in the lock's version, and the C compiler that Triton calls when it compiles a kernel. Beyond
# the base image only the package index is asked, so PIP_INDEX_URL may name a mirror.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel AS base
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ARG PIP_INDEX_URL
COPY constraints.txt /opt/quantspec/constraints.txt
ENV PIP_CONSTRAINT=/opt/quantspec/constraints.txt

FROM base AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY qspec_compile qspec_compile
COPY passes passes
COPY kernels kernels
COPY evals evals
COPY benchmarks benchmarks
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base
COPY --from=wheel /wheels /wheels
RUN pip install "$(ls /wheels/*.whl)[serve,gguf]" && rm -r /wheels
ENV HF_HOME=/cache
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["quantspec", "serve", "--host", "0.0.0.0"]
