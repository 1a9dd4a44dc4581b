#!/usr/bin/env bash
# The whole path on real text, as a user would type it: data, model, plan, training on two processes, resuming, merging.
# Everything is written below ./first_run; run it again to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
out=first_run
rm -rf "$out"
mkdir "$out"

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=2
if [ "$gpus" = 1 ]; then processes=1; fi
if [ "$gpus" = 0 ]; then export OMP_NUM_THREADS=$(( $(nproc) > 1 ? $(nproc) / 2 : 1 )); fi

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { say "\$ $*"; "$@"; }

step python examples/shakespeare.py --output $out/inputs
step python bookcorpus.py --data_path_or_name $out/inputs/plays --tokenizer_path_or_name $out/inputs/tokenizer \
    --save_path $out/plays_512 --sequence_length 512
step python create_mini_model.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --output_id $out/llama3_mini \
    --tokenizer $out/inputs/tokenizer --set hidden_size=256 --set intermediate_size=768 \
    --set num_attention_heads=8 --set num_key_value_heads=4

args=(--name first_run --model_id $out/llama3_mini --dataset_path $out/plays_512
    --plan_ngpus $processes --runtime_ngpus $processes --enable-chunk-loss
    --micro_batch_size 4 --grad_accumulation_steps 1 --learning_rate 3e-3 --warmup_steps 3
    --checkpoint_dir $out/checkpoints --checkpoint_interval 20 --log_dir $out/runs --gen_savedir $out/compiled)

step python train.py --run_mode compile "${args[@]}"
step torchrun --nproc_per_node=$processes train.py "${args[@]}" --max_train_steps 24
step torchrun --nproc_per_node=$processes train.py "${args[@]}" --max_train_steps 36 --resume_path $out/checkpoints
step python ckpt_merger.py --ckpt_dir $out/checkpoints --output_fname $out/merged.ckpt --output_dir $out/merged_model
step python examples/look.py --run $out/runs/first_run --model $out/merged_model --prompt "KING HENRY" --plot $out/loss.png

say "Done. Look at"
printf '  %-24s %s\n' \
    "loss curve" "$out/loss.png" \
    "plan" "$out/compiled/first_run/plan.html" \
    "generated code" "$out/compiled/first_run/gencode_stage0.py" \
    "TensorBoard" "tensorboard --logdir $out/runs" \
    "merged model" "$out/merged_model" \
    "merged checkpoint" "$out/merged.ckpt"
