"""FastAPI as people write it first: `def` handlers, which run in a pool of threads, and no batching.

PEER_ENGINE is `torch`, or `onnxruntime` for those who have exported their nets.
"""

import os
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, Request, Response

from benchmarks.peers.work import HOST, MEDIA_TYPES, Ask, Nets, OnnxNets, decode, encode, port, workers


@asynccontextmanager
async def lifespan(app: FastAPI):
    """Load the nets in each process that serves."""
    app.state.nets = OnnxNets() if os.environ.get("PEER_ENGINE") == "onnxruntime" else Nets()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/sample")
def sample(ask: Ask, request: Request) -> Response:
    """Draw images."""
    images = request.app.state.nets.sample([ask])[0]
    return Response(encode(images, ask), media_type=MEDIA_TYPES[ask.format])


@app.post("/discriminate")
def discriminate(body: Annotated[bytes, Body(media_type="application/octet-stream")], request: Request) -> Response:
    """Judge images."""
    nets = request.app.state.nets
    return Response(nets.verdicts(nets.judge([decode(body)])[0]), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.peers.plain_server:app",
        host=HOST,
        port=port(),
        workers=workers(),
        log_level="warning",
        access_log=False,
    )
