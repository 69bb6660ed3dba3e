#!/bin/sh
# Inside a container of Alpine Linux with the clone at /clone: the packed packages train, without a compiler.
set -eu
mkdir /tmp/project && cd /tmp/project
echo '{ "private": true }' > package.json
npm install /clone/out/packages/arl-[0-9]*.tgz /clone/out/packages/arl-linux-x64-musl-*.tgz
assets=node_modules/arl/assets
npx arl train --model_name_or_path $assets/model --train_file $assets/train.jsonl --output_dir out --max_steps 5
npx arl generate --model_name_or_path out --prompt Hello --max_new_tokens 4
