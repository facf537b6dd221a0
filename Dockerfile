# syntax=docker/dockerfile:1
# The server of a guarded model. The wheels of torch are those that pip takes by itself, with CUDA;
# for others, of the CPU alone or of another CUDA: --build-arg TORCH_INDEX=<their index>.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir torch --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY . ./
RUN /venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[cli,pocket,serve]'

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 guard \
    && useradd --uid 10001 --gid guard --create-home guard \
    && install --directory --owner guard --group guard /home/guard/.cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
# models and fitted guards, kept between containers
VOLUME /home/guard/.cache
EXPOSE 8000
# long enough to load a model and fit its guard for the first time
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["vlm-safeguard", "serve", "--host", "0.0.0.0"]
CMD ["pocket"]
