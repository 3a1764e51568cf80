"""The chat templates of published models, without their tools, and what becomes of each.

The texts are those of the models' tokenizer_config.json, cut to what they write for a conversation.
"""

from dataclasses import dataclass, field


@dataclass
class Published:
    source: str
    specials: list[str]  # special tokens of the tokenizer beside eos and bos
    eos: str
    bos: str = ""
    kwargs: dict = field(default_factory=dict)
    followed: str = ""  # the template, or
    refused: str = ""  # a part of the reason
    no_system: str = ""  # a part of the reason why a system message is refused
    sentencepiece: str = ""  # a scheme of tokenizers_like.sentencepiece; default: byte-level


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace(
    "{{'<|im_start|>'",
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>'",
)
QWEN2_5 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" and not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set ns.last_query_index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')
                                               .split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')
                + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SMOLLM3 = """\
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\n\\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content.rstrip() ~ '\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_2 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% endif %}{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
PHI3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
R1_DISTILL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
IM = ["<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
CHATML_TURNS = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
LLAMA3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\n{prompt|trim}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{response|trim}<|eot_id|>"
)

PUBLISHED = {
    "ChatML": Published(
        CHATML,
        IM,
        "<|im_end|>",
        followed="<|im_start|>system\n{system}<|im_end|>\n{turn}" + CHATML_TURNS,
    ),
    "SmolLM2": Published(
        SMOLLM2,
        IM,
        "<|im_end|>",
        "<|im_start|>",
        followed="<|im_start|>system\n{system}<|im_end|>{no_system}<|im_start|>system\nYou are a"
        " helpful AI assistant named SmolLM<|im_end|>{turn}\n" + CHATML_TURNS.removesuffix("\n"),
    ),
    "Qwen 2.5 base": Published(
        QWEN2_5,
        IM,
        "<|endoftext|>",
        followed="<|im_start|>system\n{system}<|im_end|>{no_system}<|im_start|>system\nYou are"
        " Qwen, created by Alibaba Cloud.<|im_end|>{turn}\n" + CHATML_TURNS.removesuffix("\n"),
    ),
    "Qwen 3": Published(
        QWEN3,
        IM,
        "<|im_end|>",
        followed="<|im_start|>system\n{system}<|im_end|>\n{turn}"
        + CHATML_TURNS.replace(
            "{response}", "{answer}{last}<think>\n\n</think>\n\n{response|thoughts}"
        ),
    ),
    "Qwen 3, enable_thinking false": Published(
        QWEN3,
        IM,
        "<|im_end|>",
        kwargs={"enable_thinking": False},
        followed="<|im_start|>system\n{system}<|im_end|>\n{turn}"
        + CHATML_TURNS.replace("{response}", "{last}<think>\n\n</think>\n\n{response|thoughts}"),
    ),
    "SmolLM3": Published(SMOLLM3, IM, "<|im_end|>", refused="it writes today's date"),
    "Llama 2": Published(
        LLAMA2,
        [],
        "</s>",
        "<s>",
        followed="<s>[INST] {prompt|trim} [/INST]{answer} {response|trim} {end}</s>",
        no_system="it writes 'ce before\\n<</SYS>>\\n\\n a space",
        sentencepiece="legacy",
    ),
    "Llama 3": Published(
        LLAMA3,
        HEADERS,
        "<|end_of_text|>",
        "<|begin_of_text|>",
        followed="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system|trim}"
        "<|eot_id|>{no_system}<|begin_of_text|>{turn}" + LLAMA3_TURNS,
    ),
    "Llama 3.2": Published(
        LLAMA3_2,
        HEADERS,
        "<|eot_id|>",
        "<|begin_of_text|>",
        refused='choose one by --chat_template_kwargs=\'{"date_string": "26 Jul 2024"}\'',
    ),
    "Llama 3.2, date_string": Published(
        LLAMA3_2,
        HEADERS,
        "<|eot_id|>",
        "<|begin_of_text|>",
        {"date_string": "26 Jul 2024"},
        followed="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul"
        " 2024\n\n{system|trim}<|eot_id|>{no_system}<|begin_of_text|><|start_header_id|>system"
        "<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>{turn}" + LLAMA3_TURNS,
    ),
    "Gemma 2": Published(
        GEMMA,
        TURNS,
        "<eos>",
        "<bos>",
        followed="<bos>{turn}<start_of_turn>user\n{prompt|trim}<end_of_turn>\n"
        "<start_of_turn>model\n{response|trim}<end_of_turn>\n",
        no_system="System role not supported",
    ),
    "Gemma 3": Published(
        GEMMA3,
        TURNS,
        "<eos>",
        "<bos>",
        followed="<bos><start_of_turn>user\n{system}\n\n{no_system}<bos><start_of_turn>user\n{turn}"
        "{prompt|trim}<end_of_turn>\n<start_of_turn>model\n{response|trim}<end_of_turn>\n"
        "<start_of_turn>user\n",
    ),
    "Mistral v0.2": Published(
        MISTRAL,
        [],
        "</s>",
        "<s>",
        followed="<s>{turn}[INST] {prompt} [/INST]{response}</s>",
        no_system="Conversation roles must alternate",
        sentencepiece="legacy",
    ),
    "Mistral v0.3": Published(
        MISTRAL_V3,
        ["[INST]", "[/INST]"],
        "</s>",
        "<s>",
        followed="<s>{turn}[INST] {prompt}[/INST]{answer} {response|trim}</s>",
        no_system="it does not write it before the first prompt",
        sentencepiece="legacy",
    ),
    "Phi-3": Published(
        PHI3,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        followed="<|system|>\n{system}<|end|>\n{turn}<|user|>\n{prompt}<|end|>\n<|assistant|>\n"
        "{response}<|end|>\n",
    ),
    "Zephyr": Published(
        ZEPHYR,
        [],
        "</s>",
        "<s>",
        followed="<|system|>\n{system}</s>\n{turn}<|user|>\n{prompt}</s>\n<|assistant|>\n"
        "{response}</s>\n",
        sentencepiece="legacy",
    ),
    "OLMo 2, Tulu 3": Published(
        OLMO2,
        [],
        "<|endoftext|>",
        "<|endoftext|>",
        followed="<|endoftext|><|system|>\n{system}\n{no_system}<|endoftext|>{turn}<|user|>\n"
        "{prompt}\n<|assistant|>\n{response}<|endoftext|>\n",
    ),
    "DeepSeek LLM": Published(
        DEEPSEEK,
        [],
        "<|end_of_sentence|>",
        "<|begin_of_sentence|>",
        followed="<|begin_of_sentence|>{system}\n\n{no_system}<|begin_of_sentence|>{turn}User: "
        "{prompt}\n\nAssistant:{answer} {response}<|end_of_sentence|>",
    ),
    "DeepSeek R1 distilled": Published(
        R1_DISTILL,
        ["<|User|>", "<|Assistant|>"],
        "<|end_of_sentence|>",
        "<|begin_of_sentence|>",
        refused="the prompt for an answer ends in '<|Assistant|><think>\\n'",
    ),
}
