FROM python:3.11-slim-bookworm

WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY worker ./worker
COPY scheduler ./scheduler
COPY sandbox ./sandbox
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin poolsweep

WORKDIR /
USER poolsweep
ENTRYPOINT ["poolsweep"]
CMD ["worker"]
