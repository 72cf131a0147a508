"""The client's end of a request: bounds what is held for it, and cancels the work for it when it leaves."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import TooLarge
from service.http.exchange import EXCHANGE, Exchange, connection
from service.http.memory_budget import SMALL_BYTES, MemoryBudget

_CLIENT = "gan.client"


def take_body(scope: Scope) -> bytes | None:
    """The whole body of this request, where it can be had without waiting.

    Raises:
        TooLarge, QueueFull: See there.
    """
    client: Client = scope[_CLIENT]
    return client.take_body()


def reserve_reply(scope: Scope, size: int) -> None:
    """Hold the memory for the reply to this request until its client has taken it. `size` is in bytes, not encoded.

    Raises:
        QueueFull: There is none.
    """
    client: Client = scope[_CLIENT]
    client.reserve_reply(size)


class Client:
    """The client's end of one request.

    Args:
        receive, send, scope: Of the request.
        bodies, replies: What all requests together hold.
        max_body_bytes: Largest body.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        scope: Scope,
        bodies: MemoryBudget,
        replies: MemoryBudget,
        max_body_bytes: int,
    ) -> None:
        self._receive = receive
        self._send = send
        self._scope = scope
        scope[_CLIENT] = self
        self._bodies, self._replies = bodies, replies
        self._max_body_bytes = max_body_bytes
        self._connection = connection(scope)
        self._body_bytes = self._reply_bytes = 0
        self._expects_body = scope["method"] != "GET"
        self._body_read: asyncio.Event | None = None  # for who waits for that
        self._left = False

    async def serve(self, app: ASGIApp) -> None:
        """Have the request answered."""
        work = self._work = asyncio.current_task()
        assert work is not None  # noqa: S101 - servers run requests in tasks
        watcher = None
        try:
            if self._connection is None:  # another server than ours: a task of its own for what ours says of itself
                watcher = asyncio.create_task(self._wait_for_departure())
            else:
                self._connection.watch(self._leave)
            await app(self._scope, self._receive_body, self._send_held)
        except asyncio.CancelledError:
            # Ours only if the client left; else the server is stopping. There is nobody left to answer.
            if not self._left or work.uncancel() > 0:
                raise
        except ClientDisconnect:
            pass  # it left while it was still sending
        finally:
            del self._scope[_CLIENT]  # which leads back to the scope: the circle would keep the body
            self._hold_nothing()
            if self._connection is not None:
                self._connection.watch(None)
            if watcher is not None:
                watcher.cancel()

    def reserve_reply(self, size: int) -> None:
        """See `reserve_reply`."""
        self._replies.check(size)
        self._replies.now += size
        self._reply_bytes += size

    def hang_up(self) -> None:
        """End the connection, because others need the memory that is held for this client.

        It counts as free from now on: or each piece of what others send before the end is through would end one more.
        """
        self._hold_nothing()
        if self._connection is not None:
            self._connection.hang_up()
        else:  # to stop in the middle of a reply is all that another server lets us do
            self._leave()

    def _hold_nothing(self) -> None:
        self._bodies.now -= self._body_bytes
        self._replies.now -= self._reply_bytes
        self._body_bytes = self._reply_bytes = 0
        for held in (self._bodies, self._replies):
            held.client_moved(self)

    async def _receive_body(self) -> Message:
        """Called by the application: the body, as far as it is allowed."""
        if self._body_bytes > SMALL_BYTES:
            self._bodies.wait_for_client(self)
        message = await self._receive()
        self._hold_body(len(message.get("body", b"")))
        if not message.get("more_body"):
            self._expects_body = False
            if self._body_read is not None:
                self._body_read.set()
            self._bodies.client_moved(self)
        return message

    def take_body(self) -> bytes | None:
        """See `take_body`."""
        exchange: Exchange = self._scope[EXCHANGE]
        body = exchange.take_body()
        if body is not None:
            self._hold_body(len(body))
            self._expects_body = False
        return body

    def _hold_body(self, more: int) -> None:
        if self._body_bytes + more > self._max_body_bytes:
            raise TooLarge(f"The body has more than {self._max_body_bytes} bytes.")
        self._bodies.check(more, self._body_bytes + more)
        self._bodies.now += more
        self._body_bytes += more

    async def _send_held(self, message: Message) -> None:
        """Called by the application: what is large is held until the client has taken (nearly) all of it."""
        size = len(message.get("body", b""))
        if size <= SMALL_BYTES or message.get("more_body"):
            await self._send(message)
            return
        # Reserved is what the images take; a long list of verdicts is not known before it is there.
        unreserved = max(0, size - self._reply_bytes)
        self._replies.now += unreserved
        self._reply_bytes += unreserved
        self._replies.wait_for_client(self)
        await self._send({**message, "more_body": True})
        # The server takes this, the end, only when its buffer has run down.
        await self._send({**message, "body": b""})

    def _leave(self) -> None:
        """The client has left. While its body is being read, whoever reads it hears of that by itself."""
        # The task is suspended inside the application, so that is where the cancellation arrives: it can't outlive
        # this request, since `serve` ends the watch before it goes on.
        if not self._expects_body and self._work is not None:
            self._left = True
            self._work.cancel()

    async def _wait_for_departure(self) -> None:
        """Once the body is in, the next thing to hear from the client is that it left."""
        if self._expects_body:
            self._body_read = asyncio.Event()
            await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass  # what a GET carries as its body
        self._leave()
