# SPDX-License-Identifier: Apache-2.0
"""The web page: `fastdllm app`, `python llada/app.py`, `python v2/app.py`. The only module that imports gradio.

Layout and wiring; what happens is in handlers.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import fastdllm
from fastdllm import registry
from fastdllm.models import tiny_names
from fastdllm.ui import handlers, options
from fastdllm.ui.canvas import answer_html, legend_html
from fastdllm.ui.conversation import Conversation
from fastdllm.ui.handlers import Choice, Common, Models, Stop

EXAMPLES = (
    options.SAMPLE_QUESTION,
    "Elizabeth scored 300 points in one game of archery. Karen scored 28 more than 50% as many as Elizabeth. "
    "How many points did Elizabeth and Karen have in total?",
    "Bobby finished half of a 404 piece puzzle, and then started and finished another 730 piece puzzle within an hour. "
    "How many puzzle pieces did Bobby place during that hour?",
    options.SUDOKU.sample,
)
MASTHEAD = '<div class="masthead"><h1>fastdllm</h1><p>A diffusion model writes by filling masks. Watch it.</p></div>'
QUEUE = 16  # visitors that may wait for the one who decodes
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "decode", "concurrency_limit": 1, "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
SET_COLOUR = "(view) => { document.body.dataset.colour = view; }"


def choice_controls(decoder: str, threshold: float = 0.9) -> list[gr.components.Component]:
    """The fields of one `Choice`, in its order; those that the decoder does not have are hidden."""
    with gr.Row():
        cache = gr.Dropdown(["default", *registry.names("caches")], value="default", label="Cache", min_width=120)
        rule = gr.Dropdown(list(registry.names("decoders")), value=decoder, label="Decoder", min_width=120)
    known = registry.options("decoders", decoder)
    value = gr.Slider(0, 1, threshold, step=0.01, label="Threshold", visible="threshold" in known)
    factor = gr.Slider(0.1, 5, 1.0, step=0.05, label="Factor", visible="factor" in known)
    steps = gr.Slider(1, 512, 128, step=1, label="Steps", visible=decoder == "quota")
    more = gr.Textbox(
        "", label="More options", placeholder="name=value, name=value", info="Any other option of DecodeConfig"
    )
    rule.change(show_fields, rule, [value, factor, steps], **AT_ONCE)
    return [cache, rule, value, factor, steps, more]


def show_fields(decoder: str) -> list[dict[str, Any]]:
    """Which of threshold, factor and steps a decoder has."""
    known = registry.options("decoders", decoder)
    return [gr.update(visible=shown) for shown in ("threshold" in known, "factor" in known, decoder == "quota")]


def common_controls(model: gr.Dropdown, slow_motion: float) -> list[gr.components.Component]:
    """The fields of `Common`, in its order."""
    with gr.Row():
        length = gr.Slider(4, 512, 128, step=4, label="New tokens")
        block = gr.Slider(4, 128, 32, step=4, label="Block length")
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the most likely token")
        seed = gr.Number(0, label="Seed", precision=0)
    with gr.Row():
        words = gr.Textbox(
            "", label="Words at positions", placeholder="5:apples, 12:left", info="position:word; they stand from the start"
        )
        pace = gr.Slider(
            0, 1, slow_motion, step=0.05, label="Slow motion (s)", info="Pause after each forward, not in the clocks"
        )
    return [model, length, block, temperature, seed, words, pace]


def slider_after(trace: Any, running: bool) -> dict[str, Any]:
    """The step slider: out of use while an answer is running, at its end afterwards."""
    steps = len(trace.steps) if trace else 0
    return gr.update(maximum=max(1, steps), value=steps, interactive=bool(steps) and not running)


def buttons(running: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    return gr.update(interactive=not running), gr.update(interactive=running)


def on_ask(models: Models, stop: Stop, conversation: Conversation, message: str, *form: Any) -> Iterator[tuple]:
    common, choice = Common(*form[: len(fields(Common))]), Choice(*form[len(fields(Common)) :])
    for frame in handlers.ask(models, stop, conversation, message, common, choice):
        slider = slider_after(frame.trace, frame.running)
        yield (
            [{**message, "content": escape(message["content"], quote=False)} for message in frame.messages],
            frame.box,
            frame.canvas,
            frame.curve,
            frame.notice,
            frame.conversation,
            frame.trace,
            slider,
            *buttons(frame.running),
        )


def on_compare(models: Models, stop: Stop, message: str, *form: Any) -> Iterator[tuple]:
    common, width = len(fields(Common)), len(fields(Choice))
    sides = [Choice(*form[common + side * width : common + (side + 1) * width]) for side in (0, 1)]
    for duel in handlers.compare(models, stop, message, Common(*form[:common]), sides):
        longest = max(duel.traces, key=lambda trace: len(trace.steps), default=None)
        slider = slider_after(longest, duel.running)
        yield duel.canvas(0), duel.canvas(1), duel.curve, duel.notice, duel.traces, slider, *buttons(duel.running)


def on_model(models: Models, name: str) -> list[Any]:
    status, caches, length = handlers.choose_model(models, name)
    return [status, length, *[gr.update(choices=caches, value="default")] * 3]


def on_stop(stop: Stop) -> None:
    stop.requested = True


def on_reset() -> tuple:
    return [], "", answer_html(None), "", "", Conversation(), None, slider_after(None, False), *buttons(False)


def build(models: Models, default_model: str, slow_motion: float = 0.2) -> gr.Blocks:
    """The page; slow_motion: seconds to wait after each forward. Nothing is loaded until somebody opens it."""
    with gr.Blocks(title="fastdllm", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                gr.HTML(MASTHEAD)
                status = gr.HTML('<div class="status">Loading the model…</div>', elem_id="status")
            names = list(dict.fromkeys([default_model, *tiny_names()]))
            model = gr.Dropdown(
                names,
                value=default_model,
                label="Model",
                allow_custom_value=True,
                min_width=200,
            )
            views = [("Forward", "step"), ("Confidence", "confidence")]
            colour = gr.Radio(views, value="step", label="Colour tokens by", elem_id="colour", min_width=250)
        with gr.Accordion("Settings of the answer", open=False):
            common = common_controls(model, slow_motion)
        colour.change(None, colour, None, js=SET_COLOUR)
        stop = gr.State(Stop())
        with gr.Tab("Chat"):
            cache = chat_tab(models, stop, common)
        with gr.Tab("Compare"):
            caches = compare_tab(models, stop, common)
        for event in (page.load, model.change):
            event(
                partial(on_model, models),
                model,
                [status, common[1], cache, *caches],
                **ONE_AT_A_TIME,
                api_visibility="private",
            )
    return page


def chat_tab(models: Models, stop: gr.State, common: list[gr.components.Component]) -> gr.components.Component:
    """Chat left, canvas right; returns the cache control."""
    conversation, trace = gr.State(Conversation()), gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            chat = gr.Chatbot(
                height=360,
                show_label=False,
                render_markdown=False,
                feedback_options=None,
                buttons=[],
                placeholder="Ask a question below.",
                elem_id="chat",
            )
            notice = gr.HTML(elem_id="notice")
            box = gr.Textbox(show_label=False, placeholder="Write a question", lines=2, max_lines=8, elem_id="message")
            with gr.Row():
                send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
                clear = gr.Button("New", elem_id="clear", min_width=80)
            gr.Examples([[text] for text in EXAMPLES], inputs=box, label="Examples", api_visibility="private")
            with gr.Accordion("Cache and decoder", open=False):
                choice = choice_controls("threshold")
        with gr.Column(scale=6, min_width=320):
            canvas = gr.HTML(answer_html(None), elem_id="canvas")
            gr.HTML(legend_html())
            slider = gr.Slider(0, 1, 0, step=1, label="Forward", interactive=False, elem_id="forward")
            curve = gr.HTML(elem_id="curve")
    outputs = [chat, box, canvas, curve, notice, conversation, trace, slider, send, halt]
    gr.on(
        [send.click, box.submit],
        partial(on_ask, models),
        [stop, conversation, box, *common, *choice],
        outputs,
        api_visibility="private",
        **ONE_AT_A_TIME,
    )
    halt.click(on_stop, stop, None, api_visibility="private", **AT_ONCE)
    clear.click(on_reset, None, outputs, api_visibility="private", **AT_ONCE)
    slider.input(handlers.at_step, [trace, slider], canvas, api_visibility="private", **AT_ONCE)
    return choice[0]


def compare_tab(models: Models, stop: gr.State, common: list[gr.components.Component]) -> list[gr.components.Component]:
    """One prompt, two settings; returns their cache controls."""
    traces = gr.State(())
    with gr.Row():
        box = gr.Textbox(options.SAMPLE_QUESTION, label="Prompt", lines=2, scale=5, elem_id="prompt")
        with gr.Column(scale=1, min_width=160):
            run = gr.Button("Compare", variant="primary", elem_id="compare")
            halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop-compare")
    notice = gr.HTML(elem_id="notice-compare")
    choices, canvases = [], []
    with gr.Row(equal_height=False):
        for side, (name, decoder) in enumerate((("A", "quota"), ("B", "threshold"))):
            with gr.Column(min_width=320):
                with gr.Accordion(f"Setting {name}", open=True):
                    choices.append(choice_controls(decoder))
                canvases.append(gr.HTML(answer_html(None), elem_id=f"canvas-{side}"))
    gr.HTML(legend_html())
    slider = gr.Slider(0, 1, 0, step=1, label="Forward", interactive=False, elem_id="forward-compare")
    curve = gr.HTML(elem_id="curve-compare")
    run.click(
        partial(on_compare, models),
        [stop, box, *common, *choices[0], *choices[1]],
        [*canvases, curve, notice, traces, slider, run, halt],
        api_visibility="private",
        **ONE_AT_A_TIME,
    )
    halt.click(on_stop, stop, None, api_visibility="private", **AT_ONCE)
    slider.input(
        lambda pair, step: [handlers.at_step(trace, step) for trace in pair] or [answer_html(None)] * 2,
        [traces, slider],
        canvases,
        api_visibility="private",
        **AT_ONCE,
    )
    return [choice[0] for choice in choices]


def launch_options() -> dict[str, Any]:
    """Look and behaviour that gradio 6 takes at launch. System fonts only: the page needs no network."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    theme = gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono).set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_700",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_padding="0",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
    )
    return {
        "theme": theme,
        "head": f"<style>{style}</style>",
        "footer_links": [],
        "ssr_mode": False,
        "show_error": True,
    }


def parser(default_model: str, prog: str | None = None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog=prog,
        description="A page that shows a diffusion language model at work: chat, every token with its forward and "
        "confidence, two settings side by side. It is served to this machine only, unless you say otherwise.",
    )
    options.add_model_options(out, default_model)
    group = out.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; 0.0.0.0: everybody)")
    group.add_argument("--port", type=int, help="default: the first free one from 7860")
    group.add_argument("--share", action="store_true", help="also make a public link through gradio's servers")
    return out


def main(arguments: Sequence[str] | None = None, default_model: str = "tiny-llada", prog: str | None = None) -> int:
    """The command; serves until interrupted. Returns the exit code: 1 when the address can't be served."""
    args = parser(default_model, prog).parse_args(arguments)
    models = Models(lambda name: fastdllm.load(name, args.device, args.dtype, args.revision))
    page = build(models, args.model).queue(default_concurrency_limit=1, max_size=QUEUE)
    print(f"fastdllm: {args.model} in the browser; Ctrl-C ends it", flush=True)
    try:
        page.launch(server_name=args.host, server_port=args.port, share=args.share, **launch_options())
    except OSError as error:  # the port is taken
        print(f"fastdllm: {error}", file=sys.stderr)
        return 1
    return 0
