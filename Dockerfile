# moe-infinity serve on a CPU: docker build -t moe-infinity .
#   docker run -p 8000:8000 -e MOE_INFINITY_API_KEY=secret -v /models:/models:ro \
#     -v moe-state:/state --memory 16g moe-infinity /models/OLMoE-1B-7B --ram 15GiB
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/moe
WORKDIR /src
COPY constraints.txt ./
# Before the sources: they change more often than what they need. Give PyTorch's CPU index as
# --build-arg TORCH_INDEX=..., or gigabytes of CUDA come along.
ARG TORCH_INDEX=""
RUN /opt/moe/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY src src
RUN /opt/moe/bin/pip install --no-cache-dir -c constraints.txt ".[serve]"

FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 moe && mkdir /state && chown moe /state
COPY --from=build /opt/moe /opt/moe
USER moe
ENV MOE_INFINITY_STATE_DIR=/state MOE_INFINITY_HOST=0.0.0.0
EXPOSE 8000
VOLUME /state
# Without MOE_INFINITY_API_KEY it refuses to listen beyond the container: a port that is published
# is open to everybody who reaches the machine.
ENTRYPOINT ["/opt/moe/bin/moe-infinity", "serve"]
HEALTHCHECK --start-period=10m CMD ["/opt/moe/bin/python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
