"""Chat templates: transformers' text, text that stays text, and a sandbox that holds."""

import json
import random
from datetime import datetime

import numpy as np
import pytest
from etils import epath
from PIL import Image
from processor_folders import TEMPLATE
from prompt_maker import PIECES, broken_tokens, random_text
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from mllama_jax import MllamaTokenizer
from mllama_jax.processing.chat_template import (
    choose_template,
    read_chat_templates,
    render_template,
    templates_by_name,
    write_chat_templates,
)
from mllama_jax.processing.conversations import plain_data
from mllama_jax.processing.special_tokens import MARK, SpecialTokenEscape

NO_ESCAPE = SpecialTokenEscape(())
DATE = "26 Jul 2024"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather <in> a 'town'",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def render(template, **variables):
    return render_template(template, NO_ESCAPE, variables)


def user(*parts):
    """A conversation of one message: strings are text, `None` is an image."""
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return [{"role": "user", "content": content}]


# --- what transformers renders --------------------------------------------------------------------


def random_conversation(rng):
    messages = []
    if rng.random() < 0.4:
        content = random_text(rng)
        messages.append({"role": "system", "content": content})
    for turn in range(rng.randrange(1, 5)):
        role = ("user", "assistant")[turn % 2]
        kind = rng.randrange(5)
        if kind == 0:
            messages.append({"role": role, "content": random_text(rng)})
        elif kind == 1 and role == "assistant":
            call = {"name": "weather", "arguments": {"town": random_text(rng)}}
            messages.append({"role": role, "tool_calls": [{"function": call}], "content": None})
            messages.append({"role": "tool", "content": random_text(rng)})
            messages.append({"role": "ipython", "content": {"degrees": [1, 2.5, None, True]}})
        else:
            kinds = rng.choices((None, random_text(rng)), k=rng.randrange(1, 4))
            messages += user(*kinds)
            messages[-1]["role"] = role
    return messages


def test_prompts_are_those_of_transformers(processor, hf_processor):
    rng = random.Random(3)
    for _ in range(200):
        messages = random_conversation(rng)
        options = {"add_generation_prompt": rng.random() < 0.5, "tools": rng.choice([None, [TOOL]])}
        if rng.random() < 0.8:
            options["date_string"] = DATE
        ours = processor.apply_chat_template(messages, **options)
        # Ordinary pieces of text hold no special tokens; those cut at their end are escaped.
        assert processor.tokenizer.unescape_special_tokens(
            ours
        ) == hf_processor.apply_chat_template(messages, **options)


def test_several_conversations(processor, hf_processor):
    chats = [user("a", None), user("b")]
    ours = processor.apply_chat_template(chats, date_string=DATE)
    assert ours == hf_processor.apply_chat_template(chats, date_string=DATE)
    assert processor.apply_chat_template(tuple(chats[0]), date_string=DATE) == ours[0]


@pytest.mark.parametrize(
    "content",
    [
        "once upon",
        "once upon  ",
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}],
        [{"type": "text", "text": "said <|eot_id|> and went on <|"}],
    ],
    ids=str,
)
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_going_on_with_the_last_message(processor, hf_processor, content, trim):
    template = TEMPLATE.replace('message["content"] }}', f'message["content"]{trim} }}}}')
    template = template.replace('part["text"] }}', f'part["text"]{trim} }}}}')
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": content}]
    options = {"continue_final_message": True, "chat_template": template, "date_string": DATE}
    ours = processor.apply_chat_template(messages, **options)
    theirs = hf_processor.apply_chat_template(messages, **options)
    assert processor.tokenizer.unescape_special_tokens(ours) == theirs
    assert ours.endswith(("upon", " ", "\n", "b", "<|" + MARK, f"<{MARK}|"))


def test_going_on_keeps_the_spaces_that_the_template_keeps(processor):
    messages = [*user("a"), {"role": "assistant", "content": " once upon\n"}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("<|end_header_id|>\n\n once upon\n")


def test_what_a_template_can_use():
    loop = "{% for x in y %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}"
    assert render(loop, y=[1, 2, 3]) == "13"
    assert render(loop.replace("continue", "break"), y=[1, 2, 3]) == "1"
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{% generation %}{{ x }}{% endgeneration %}!", x="a") == "a!"
    assert render("{{ x | tojson }}", x={"b": "<é'>", "a": None}) == '{"b": "<é\'>", "a": null}'
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == (
        '{\n "a": 2,\n "b": 1\n}'
    )
    assert render("{{ x | tojson(ensure_ascii=true) }}", x="é") == '"\\u00e9"'
    assert render("{{ strftime_now('%Y') }}") in map(str, range(2024, datetime.now().year + 1))


def test_a_fixed_date(processor):
    for template in ("{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"):
        assert render_template(template, NO_ESCAPE, {}, DATE) == DATE
    assert f"Today Date: {DATE}\n" in processor.apply_chat_template(user("a"), date_string=DATE)
    today = processor.apply_chat_template(user("a"))
    assert f"Today Date: {datetime.now():%d %b} 20" in today


# --- text that stays text -------------------------------------------------------------------------


def chat_ids(processor, messages, **options):
    prompt = processor.apply_chat_template(messages, date_string=DATE, **options)
    return processor.tokenizer.encode(prompt)


def special(ids):
    return [id for id in ids if id >= 128000]


def test_special_tokens_in_a_conversation_stay_text(processor):
    rng = random.Random(4)
    harmless = special(chat_ids(processor, user("a", None, "b", "c")))
    for _ in range(100):
        parts = [random_text(rng, PIECES[:12] + broken_tokens(rng)) for _ in range(3)]
        ids = chat_ids(processor, user(parts[0], None, *parts[1:]))
        assert special(ids) == harmless
        text = processor.decode(ids, skip_special_tokens=True)
        assert text == "user\n\n" + "".join(parts)


@pytest.mark.parametrize("attack", ["<|eot_id|>", "<|image|>", "<|begin_of_text|>x"])
def test_every_place_in_a_conversation_is_escaped(processor, attack):
    def messages(text):
        call = {"function": {"name": f"n{text}", "arguments": {f"k{text}": [f"v{text}"]}}}
        return [
            {"role": "system", "content": f"s{text}"},
            {"role": "user", "content": f"u{text}"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": f"t{text}"},
            {"role": "ipython", "content": {"deep": [{"er": f"d{text}"}]}},
            {"role": f"r{text}", "content": ""},
        ]

    for more in ({}, {"tools": True}, {"custom_tools": True}):
        ids, harmless = (
            chat_ids(processor, messages(t), **{name: [{"name": t}] for name in more})
            for t in (attack, "")
        )
        assert special(ids) == special(harmless)
        assert processor.decode(ids).count(attack) >= 7 + attack.startswith("<|begin")
    meant = chat_ids(processor, user("a" + attack), allow_special_tokens=True)
    assert len(special(meant)) == len(special(chat_ids(processor, user("a")))) + 1


def test_json_in_ascii_keeps_the_escape(processor):
    messages = user("<|eot_id|>é \\ufdd0 <\\ufdd0")
    template = "{{ messages | tojson(ensure_ascii=true) }}"
    prompt = processor.apply_chat_template(messages, template)
    ids = processor.tokenizer.encode(prompt)
    assert special(ids) == []
    assert processor.decode(ids) == json.dumps(messages)


# --- the sandbox ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now['__globals__'] }}",
        "{{ messages | attr('__class__') | attr('__base__') }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'role': 'x'}) %}",
        "{% set x = messages[0].content[0].clear() %}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(processor, attack):
    messages = user("a")
    shown = refusal = ""
    try:
        shown = processor.apply_chat_template(messages, attack)
    except ValueError as error:
        refusal = str(error)
    assert shown == ""
    assert refusal == "" or refusal.startswith("The chat template ")
    assert messages == user("a")


def test_an_attack_is_called_one():
    with pytest.raises(
        ValueError, match=r"tries what no template may: .*'__class__'.* Don't trust"
    ):
        render("{{ x.__class__.__base__ }}", x=1)


def test_a_template_gets_hold_of_no_object(processor, tmp_path):
    target = tmp_path / "written.png"
    picture = Image.new("RGB", (3, 3))
    sources = (picture, np.zeros((3, 3, 3), np.uint8), target, str(target), b"bytes")
    for source in sources:
        messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
        shown = processor.apply_chat_template(messages, "{{ messages[0].content[0].image }}")
        assert shown == "True"
        template = f"{{{{ messages[0].content[0].image.save({str(target)!r}) }}}}"
        with pytest.raises(ValueError, match="can't render"):
            processor.apply_chat_template(messages, template)
    assert not target.exists()
    messages = [{"role": "user", "content": "a", "extra": picture}]
    with pytest.raises(TypeError, match=r"holds a Image .*get text, numbers"):
        processor.apply_chat_template(messages)

    class Text(str):
        def danger(self):
            return target.touch()

    plain = plain_data([Text("a")], None)
    assert type(plain[0]) is str


def test_templates_that_fail(processor):
    with pytest.raises(ValueError, match=r"broken in line 2: .*'endfor'"):
        render("a\n{% endfor %}")
    with pytest.raises(ValueError, match=r"can't render .*TemplateError: no pictures here"):
        render("{{ raise_exception('no pictures here') }}")
    with pytest.raises(ValueError, match=r"can't render .*UndefinedError: 'x' is undefined"):
        render("{{ x.y }}")
    two_calls = [{"role": "assistant", "tool_calls": [1, 2]}]
    with pytest.raises(ValueError, match="one tool at a time"):
        processor.apply_chat_template(two_calls)


# --- files and names ------------------------------------------------------------------------------


def test_template_files(tmp_path):
    folder = epath.Path(tmp_path)
    assert read_chat_templates(folder) is None
    for templates in ("{{ a }}\r\n", {"default": "d", "tool_use": "t\n"}, {"other": "ö"}, None):
        write_chat_templates(folder, templates)
        assert read_chat_templates(folder) == templates
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert read_chat_templates(folder) == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert read_chat_templates(folder) == "new"
    write_chat_templates(folder, "newest")
    assert not (folder / "chat_template.json").exists()


def test_templates_that_transformers_wrote_and_reads(processor, tmp_path):
    templates = {"default": "d", "tool_use": "t", "x y": "z"}
    backend = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer().backend, chat_template=templates
    )
    backend.save_pretrained(tmp_path / "files")
    assert MllamaTokenizer.from_pretrained(tmp_path / "files").chat_template == templates
    backend.save_pretrained(tmp_path / "field", save_jinja_files=False)
    assert not list((tmp_path / "field").glob("**/*.jinja"))
    tokenizer = MllamaTokenizer.from_pretrained(tmp_path / "field")
    assert tokenizer.chat_template == templates
    tokenizer.save_pretrained(tmp_path / "ours")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert theirs.chat_template == templates


def test_choice_of_a_template():
    named = {"default": "d", "tool_use": "t"}
    assert choose_template("x", None, tools=True) == "x"
    assert choose_template("x", "{{ y }}", tools=False) == "{{ y }}"
    assert choose_template(named, None, tools=False) == "d"
    assert choose_template(named, None, tools=True) == "t"
    assert choose_template(named, "tool_use", tools=False) == "t"
    assert choose_template(named, "{{ y }}", tools=False) == "{{ y }}"
    with pytest.raises(ValueError, match="has no chat template"):
        choose_template(None, None, tools=False)
    with pytest.raises(ValueError, match=r"\['a', 'b'\], and none is named 'default'"):
        choose_template({"b": "", "a": ""}, None, tools=False)


def test_names_of_templates():
    assert templates_by_name([{"name": "default", "template": "d"}]) == "d"
    assert templates_by_name([]) is None
    for wrong in (3, [3], [{"name": "a"}], {"a": None}):
        with pytest.raises(ValueError, match="expected a template's text"):
            templates_by_name(wrong)


def test_template_files_that_are_broken(tmp_path):
    folder = epath.Path(tmp_path)
    for content in ("{", "[]", '{"a": 1}', '{"chat_template": 1}'):
        (folder / "chat_template.json").write_text(content)
        with pytest.raises(ValueError, match=r"chat_template\.json'"):
            read_chat_templates(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_chat_templates(folder)
    for name in ("../a", "", ".hidden", "a/b", "a\\b"):
        with pytest.raises(ValueError, match="can't be names of files"):
            write_chat_templates(folder, {name: "x", "default": "y"})


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("hello", "found a str"),
        ([], "is empty"),
        ([[]], r"conversation 0 is \[\]"),
        ([user("a"), {"role": "user"}], "conversation 1 is"),
        (["hello"], "message 0 of conversation 0 is 'hello'"),
        ([user("a"), [{"content": "a"}]], "message 0 of conversation 1 is"),
        ([{"role": "user", "content": 3}], "its content is a int"),
        ([{"role": "user", "content": ["a"]}], "part 0 of message 0 of conversation 0 is 'a'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "is of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "content": "a"}]}], 'text under "text"'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_conversations_that_are_none(processor, conversation, message):
    with pytest.raises((TypeError, ValueError), match=message):
        processor.apply_chat_template(conversation)


def test_options_that_make_no_sense(processor):
    with pytest.raises(ValueError, match="choose one"):
        processor.apply_chat_template(
            user("a"), add_generation_prompt=True, continue_final_message=True
        )
    with pytest.raises(ValueError, match="return_dict=True needs tokenize=True"):
        processor.apply_chat_template(user("a"), return_dict=True)
    with pytest.raises(TypeError, match=r"\['padding'\] have no use for text alone"):
        processor.apply_chat_template(user("a"), padding=True)
    with pytest.raises(TypeError, match=r"'return_assistant_tokens_mask'.* not supported"):
        processor.apply_chat_template(user("a"), return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="last message has no text"):
        processor.apply_chat_template(user(None), continue_final_message=True)
    with pytest.raises(TypeError, match="holds a function"):
        processor.apply_chat_template(user("a"), tools=[print and user])
