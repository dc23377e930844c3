"""List the tools that models may call, from where they are and who must be asked; says what is wrong with any."""

import argparse
import json

HELP = "the tools that models may call"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with the schemas")


def run(arguments: argparse.Namespace) -> int:
    from runtime.tool_config import default_path, open_toolbox, read
    from tui.progress import ProgressLine
    from tui.widgets.printable import one_line

    config = read()
    faults: list[str] = []
    with ProgressLine("opening") as line:
        line.show(0.0, detail=f"{len(config.entries)} of {default_path()}")
        toolbox = open_toolbox(config, faults.append)
    with toolbox:
        if arguments.json:
            tools = [
                {
                    "name": tool.name,
                    "policy": toolbox.policy(tool.name),
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters),
                }
                for tool in toolbox.tools
            ]
            print(json.dumps({"file": str(default_path()), "tools": tools, "problems": faults}, indent=2))
        elif not config.entries:
            print(f"no tools are named in {default_path()}; the README says how")
        else:
            width = max((len(tool.name) for tool in toolbox.tools), default=0)
            for tool in toolbox.tools:
                print(f"{tool.name:{width}}  {toolbox.policy(tool.name):5}  {one_line(tool.description)[:200]}")
            for fault in faults:
                print(f"PROBLEM: {one_line(fault)}")
    return 1 if faults else 0
