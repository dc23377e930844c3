"""An MCP server as others write them: `python -m tests.mcp_server` on its standard streams, with a port over HTTP."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ImageContent

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def long(n: int) -> str:
    """So many letters."""
    return "x" * n


@server.tool()
def fail() -> str:
    """Never works."""
    raise ToolError("no luck today")


@server.tool()
def wait(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "waited"


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "none")


@server.tool()
def picture() -> ImageContent:
    """A picture."""
    return ImageContent(type="image", data="AAAA", mime_type="image/png")


@server.tool()
def leave() -> str:
    """End the server."""
    os._exit(0)


if __name__ == "__main__":
    sys.stderr.write("the server has begun\n")
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
