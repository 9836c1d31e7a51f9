#!/bin/sh
# A stand-in for the binary: takes the same commands and writes plausible outputs at once.
# FAKE_CALLS: a file to which every call is added. FAKE_FAIL: a call containing this text leaves a
# part of its work behind and fails. FAKE_NULL: a `loss` containing it finds no number. FAKE_HANG: a call containing it waits until it is interrupted.
set -eu
echo "$*" >>"$FAKE_CALLS"
out=
file=
seed=0
steps=25
verb=$1
[ $# -ge 3 ] && out=$3
pattern=1:2
keep=
chosen=
previous=
for word in "$@"; do
  case $previous in
  --json) file=$word ;;
  --seed) seed=$word ;;
  --steps) steps=$word ;;
  --pattern) pattern=$word ;;
  --keep) keep=$word ;;
  --selection) chosen=$word ;;
  esac
  previous=$word
done
# A number from 0 to 99 that depends on the call's arguments alone.
noise=$(($(printf '%s' "$*" | cksum | cut -d' ' -f1) % 100))

# Training leaves a checkpoint behind when it is stopped, and counts its parts.
part() {
  mkdir -p "$out"
  echo part >>"$out/parts"
}
case "$verb" in learn | distill) part ;; esac
if [ -n "${FAKE_HANG:-}" ] && case "$*" in *"$FAKE_HANG"*) true ;; *) false ;; esac; then
  trap 'echo checkpoint written; exit 130' INT
  echo hanging >"$FAKE_CALLS.hanging"
  while :; do sleep 0.05; done
fi
if [ -n "${FAKE_FAIL:-}" ] && case "$*" in *"$FAKE_FAIL"*) true ;; *) false ;; esac; then
  echo "error: out of luck" >&2
  exit 1
fi

metrics() {
  step=1
  : >"$out/metrics.jsonl"
  while [ $step -le 40 ]; do
    loss=$(awk "BEGIN { srand($step + $noise); print 0.02 + 0.3 / $step + rand() * 0.01 }")
    echo "{\"step\":$step,\"loss\":$loss,\"lr\":0.0005,\"grad_norm\":1.0,\"skipped\":0}" >>"$out/metrics.jsonl"
    step=$((step + 1))
  done
}
model() {
  mkdir -p "$1"
  echo "weights $noise" >"$1/model.safetensors"
  echo "{\"depth\":$2}" >"$1/config.json"
}
resources() { echo '{"seconds": 12.5, "peak_rss_bytes": 300000000, "threads": 2}' >"$out/resources.json"; }
depth_of() { sed -n 's/.*"depth":\([0-9]*\).*/\1/p' "$1/config.json"; }
selection() {
  if [ "$(depth_of "$parent")" = 8 ]; then
    groups='{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2}'
    kept='0,2,5,7'
    echo "{\"depth\":8,\"kept\":[$kept],\"groups\":[$groups],\"criterion\":\"fake\"}" >"$out/selection.json"
    return
  fi
  if [ "$pattern" = 2:4 ]; then
    groups='{"n":2,"m":4},{"n":2,"m":4},{"n":2,"m":4},{"n":2,"m":4}'
    kept='0,1,4,7,9,10,12,15'
  else
    groups='{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2},{"n":1,"m":2}'
    kept="0,$((2 + seed % 2)),4,7,$((8 + seed / 2 % 2)),11,12,15"
  fi
  echo "{\"depth\":16,\"kept\":[$kept],\"groups\":[$groups],\"criterion\":\"fake\"}" >"$out/selection.json"
}
parent=$2
case "$verb" in
inspect)
  depth=$(depth_of "$2")
  family=$(sed -n 's/.*"architecture":"\([^"]*\)".*/\1/p' "$2/config.json")
  echo "{\"depth\":$depth,\"parameters\":$((depth * 70000 + 12345)),\"config\":{\"architecture\":\"${family:-DiT}\"}}"
  ;;
learn)
  selection
  metrics
  step=1
  : >"$out/history.jsonl"
  while [ $step -le 60 ]; do
    sure=$(awk "BEGIN { print 0.3 + 0.7 * $step / 60 }")
    at=$((step / 20 % 2))
    confidence="$sure,$sure,$sure,$sure"
    kept='0,1,4,7,9,10,12,15'
    if [ "$(depth_of "$parent")" = 8 ]; then
      kept='0,2,5,7'
    elif [ "$pattern" = 1:2 ]; then
      confidence="$confidence,$sure,$sure,$sure,0.6"
      kept="0,$((3 - at)),4,7,$((9 - at)),11,12,$((15 - at))"
    fi
    echo "{\"step\":$step,\"tau\":1.0,\"scale\":100.0,\"kept\":[$kept],\"confidence\":[$confidence],\"keep_probability\":[]}" >>"$out/history.jsonl"
    step=$((step + 1))
  done
  resources
  ;;
score)
  mkdir -p "$out"
  selection
  resources
  ;;
cut)
  # One block more than there are commas.
  blocks=${keep:-$(sed 's/.*"kept":\[\([0-9,]*\)\].*/\1/' ${chosen:+"$chosen"})}
  model "$out" $(($(printf '%s' "$blocks" | tr -dc ',' | wc -c) + 1))
  echo "{\"depth\":16,\"kept\":[$blocks],\"groups\":[],\"criterion\":\"fake\"}" >"$out/selection.json"
  resources
  ;;
narrow)
  model "$out" "$(depth_of "$parent")"
  echo '{"depth":16,"kept":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15],"groups":[],"criterion":"fake"}' >"$out/selection.json"
  resources
  ;;
activations)
  echo '{"layers":[{"layer":0,"edges":[-1.0,0.0,1.0],"counts":[3,5],"mean":0.1,"std":0.5,"max_abs":0.9,"beyond":[{"sigma":2.0,"share":0.05}]}]}' >"$file"
  ;;
distill)
  model "$out/model" "$(depth_of "$parent")"
  metrics
  resources
  ;;
loss)
  if [ -n "${FAKE_NULL:-}" ] && case "$*" in *"$FAKE_NULL"*) true ;; *) false ;; esac; then
    echo '{"loss": null, "standard_error": null, "images": 2048}' >"$file"
    exit 0
  fi
  echo "{\"loss\": 0.0$((2 + noise / 20))$noise, \"standard_error\": 0.0003, \"images\": 2048}" >"$file"
  ;;
sample)
  mkdir -p "$out"
  echo "samples $noise" >"$out/samples.npz"
  cp "$FAKE_GRID" "$out/grid.png"
  depth=$(depth_of "$2")
  speed=$(awk "BEGIN { print 8000 / $depth / $steps }")
  echo "{\"count\":600,\"seconds\":10.0,\"images_per_second\":$speed,\"steps\":$steps,\"sampler\":\"ddim\",\"cfg\":2.0,\"seed\":0}" >"$out/sample.json"
  resources
  ;;
evaluate)
  echo "{\"fid\":$((5 + noise)).5,\"inception_score\":8.1,\"precision\":0.8,\"recall\":0.5,\"kid\":0.01,\"accuracy\":0.9,\"features\":\"shapes-classifier (not Inception)\",\"reference_count\":2000,\"sample_count\":600,\"warnings\":[\"few samples\"]}" >"$file"
  ;;
*)
  echo "no such command: $verb" >&2
  exit 2
  ;;
esac
