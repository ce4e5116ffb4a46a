# How a chain submits its jobs; the files in slurm/chains source this one.
#   stage NAME "STAGES BEFORE" SCRIPT ARGUMENTS...   starts when those before it have ended well
#   end_of_chain                                     reports in ldm-chain-<job>.log how it ended
# Options on a chain's command line are sbatch's, for all its jobs; NAME_sbatch in the environment is for one
# stage alone, and NAME_args changes its command. When a stage fails, those that wait for it are cancelled; one
# that is queued again keeps them waiting.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh
OPTIONS=("$@")
declare -A NUMBER=()
STAGES=()

stage() {
    local name=$1 before=$2 script=$3 options_name=$1_sbatch arguments_name=$1_args options arguments other
    shift 3
    read -ra options <<<"${!options_name:-}"
    read -ra arguments <<<"${!arguments_name:-}"
    local after=()
    for other in $before; do after+=("${NUMBER[$other]}"); done
    if ((${#after[@]})); then
        options=("--dependency=afterok:$(IFS=:; echo "${after[*]}")" --kill-on-invalid-dep=yes "${options[@]}")
    fi
    NUMBER[$name]=$(sbatch --parsable --job-name="ldm-$name" --output="ldm-$name-%j.log" \
        "${OPTIONS[@]}" "${options[@]}" "$script" "$@" "${arguments[@]}") || withdraw
    STAGES+=("$name:${NUMBER[$name]}")
    printf '%-12s job %s%s\n' "$name" "${NUMBER[$name]}" "${before:+, after $before}"
}

# Half a chain is no use.
withdraw() {
    echo "error: sbatch refused a job of the chain; those before it are cancelled" >&2
    ((${#STAGES[@]} == 0)) || scancel "${STAGES[@]#*:}"
    exit 2
}

end_of_chain() {
    local all=("${STAGES[@]#*:}") report
    report=$(sbatch --parsable --output=ldm-chain-%j.log "${OPTIONS[@]}" --nodes=1 --ntasks=1 \
        --dependency="afterany:$(IFS=:; echo "${all[*]}")" slurm/report.sbatch "${STAGES[@]}") || withdraw
    echo "how it ends  ldm-chain-$report.log; scancel ${all[*]} $report  ends it now"
}
