# The serving image: Python, what serving needs, the two packages and the embedded bundles. Nothing of training.
#
#   docker build -t gan-service .                            torch without CUDA
#   docker build -t gan-service --build-arg TORCH=cuda .     with CUDA, several GB more

ARG BASE=python:3.11-slim-bookworm

# Only the list of requirements goes on to the next stage, so that the layer with torch in it outlives
# every edit of pyproject.toml that leaves the list as it was.
FROM ${BASE} AS requirements
COPY pyproject.toml .
RUN ["python", "-c", "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\\n', file=open('requirements.txt', 'w'))"]

FROM ${BASE} AS dependencies
# cpu or cuda; an index that is named overrules it.
ARG TORCH=cpu
ARG TORCH_INDEX=
WORKDIR /build
COPY constraints.txt .
COPY deploy/torch_index.py deploy/torch_index.py
COPY --from=requirements requirements.txt .
# pip stays outside the environment it fills. An index of torch's own gives torch and nothing else, so no other package
# can come from there; what torch itself needs is found missing, and added, by the second install. Where PyTorch's index
# does not answer, the default one is taken, and the build's log says so.
# Bytecode whose freshness is judged by time stamps went stale when the layer was copied, and a read-only root can't
# renew it: start-up then compiled half of torch. This bytecode is never compared with its source again.
# (`|| true`: torch ships a module for newer Pythons only, which never compiles and is never imported.)
# torch's headers and C++ tests, 150 MB, are for people who build against it.
RUN set -eu; \
    python -m venv --without-pip /opt/venv; \
    install="python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -c constraints.txt"; \
    index=$(python deploy/torch_index.py /opt/venv "${TORCH_INDEX}" "${TORCH}"); \
    if [ -n "$index" ]; then $install --no-deps --index-url "$index" torch; fi; \
    $install -r requirements.txt; \
    cd /opt/venv/lib/python3*/site-packages; \
    rm -rf torch/include torch/test; \
    python -m compileall -qq -j 0 --invalidation-mode unchecked-hash . || true

FROM dependencies AS application
WORKDIR /app
COPY bundles/ bundles/
COPY models/ models/
COPY service/ service/
# A checkout with a tight umask must stay readable for a user that owns none of it.
RUN python -m compileall -q --invalidation-mode unchecked-hash models service && chmod -R a+rX /app

FROM ${BASE}
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="gan-service" \
      org.opencontainers.image.description="Serves the images of a small generative adversarial net over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    GAN_HOST=0.0.0.0 \
    GAN_PORT=8000
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=application /app /app
WORKDIR /app
# A number, so that an orchestrator can see that it isn't root. No account has it: any other number works as well.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Start-up gets a minute before failures count. http.client reads no proxy variables. Over TLS the certificate is not
# verified: it is for the service's name, not for 127.0.0.1.
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "-c", "import os, ssl, sys; from http.client import HTTPConnection, HTTPSConnection; tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); tls.check_hostname = False; tls.verify_mode = ssl.CERT_NONE; at = ('127.0.0.1', int(os.environ['GAN_PORT'])); c = HTTPSConnection(*at, timeout=2, context=tls) if os.environ.get('GAN_TLS_CERT_FILE') else HTTPConnection(*at, timeout=2); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
# Exec form: Python is process 1 and gets the signal itself. Flags of the service can follow the image's name.
ENTRYPOINT ["python", "-m", "service"]
