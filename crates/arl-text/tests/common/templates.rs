//! Templates of other families than ChatML, short and in their style, with the token that ends a reply.

/// Llama 3: headers between special tokens, contents trimmed, calls as JSON that has no tags.
pub(crate) const LLAMA: &str = "{{- bos_token }}{%- for m in messages %}\
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}\
    {%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}\
    {%- set f = m.tool_calls[0].function %}{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{- f.arguments | tojson }}{{- '}' }}\
    {%- elif m.role == 'tool' %}{{- m.content | tojson }}{%- else %}{{- m.content | trim }}{%- endif %}\
    {{- '<|eot_id|>' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}";

/// Mistral: no generation prompt, a space before each reply, no system role.
pub(crate) const MISTRAL: &str = "{{- bos_token }}{%- for m in messages %}\
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}\
    {%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + ' [/TOOL_RESULTS]' }}\
    {%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{{- ', ' if not loop.first }}\
    {{- c.function | tojson }}{%- endfor %}{{- ']' + eos_token }}\
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}\
    {%- else %}{{- raise_exception('Only user, assistant and tool roles are supported!') }}{%- endif %}{%- endfor %}";

/// Gemma: the assistant is `model`, roles must alternate, a newline follows the end of a turn.
pub(crate) const GEMMA: &str = "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}\
    {%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}\
    {%- set role = 'model' if m.role == 'assistant' else m.role %}\
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}";

/// Phi 3: the end of text follows where no generation prompt does.
pub(crate) const PHI: &str = "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}";

/// DeepSeek-R1's distilled models: the last system message comes first, reasoning is cut, calls are written only where the
/// content is null, their arguments must be a text, and the generation prompt opens the reasoning.
pub(crate) const DEEPSEEK: &str = "{%- set ns = namespace(system='') %}\
    {%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}{%- endif %}{%- endfor %}\
    {{- bos_token + ns.system }}{%- for m in messages %}\
    {%- if m.role == 'user' %}{{- '<U>' + m.content }}\
    {%- elif m.role == 'assistant' and m.content is none %}{{- '<A>' }}{%- for c in m.tool_calls %}\
    {{- '<call>' + c.type + '<sep>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```</call>' }}{%- endfor %}{{- eos_token }}\
    {%- elif m.role == 'assistant' %}{{- '<A>' + m.content.split('</think>')[-1] + eos_token }}\
    {%- elif m.role == 'tool' %}{{- '<out>' + m.content + '</out>' }}{%- endif %}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<A><think>\\n' }}{%- endif %}";

/// Special tokens of all of them.
pub(crate) const SPECIAL: [&str; 7] =
    ["<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<eos>", "<|start_header_id|>", "<|end_header_id|>"];
