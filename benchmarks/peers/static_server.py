"""Raw ASGI that reads a request and sends fixed bytes, one image's: what HTTP alone costs under uvicorn."""

from typing import Any

import uvicorn

from benchmarks.peers.work import HOST, Ask, Nets, encode, port

ASK = Ask(seed=7)
REPLY = encode(Nets().sample([ASK])[0], ASK)
HEADERS = [(b"content-type", b"image/png"), (b"content-length", str(len(REPLY)).encode())]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": REPLY})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host=HOST,
        port=port(),
        http="httptools",
        loop="uvloop",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
