"""Tools in the words of Hermes 2 Pro and Qwen 2.5, for models whose template or server says nothing
of them: most models answer these with calls that can be read. Pure.
"""

from __future__ import annotations

import json

from memory.calls import dump

WORDS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def told(tools: str) -> str:
    """A text for the system prompt, of a JSON list as in memory.context.Context.tools."""
    return WORDS.format(tools="\n".join(dump(tool) for tool in json.loads(tools)))
