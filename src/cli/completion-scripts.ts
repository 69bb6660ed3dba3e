/**
 * The scripts by which shells complete `arl`: each asks `arl` itself (`complete.ts`), so none has a list of its own. What a user
 * has typed is passed as words, never evaluated.
 */

const BASH = `# bash completion of arl
_arl_completion() {
	local current="\${COMP_WORDS[COMP_CWORD]}" before=() word line how="" IFS=$'\\n'
	# bash splits words at "="; arl takes --NAME=VALUE as one.
	for word in "\${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		if [[ $word == = || ( \${#before[@]} -gt 0 && \${before[\${#before[@]}-1]} == --*= ) ]]; then
			before[\${#before[@]}-1]+=$word
		else
			before+=("$word")
		fi
	done
	local shown=$current
	if [[ $current == = ]]; then
		current="\${before[\${#before[@]}-1]}="; shown=""
		unset "before[\${#before[@]}-1]"
	elif [[ \${#before[@]} -gt 0 && \${before[\${#before[@]}-1]} == --*= ]]; then
		current="\${before[\${#before[@]}-1]}$current"
		unset "before[\${#before[@]}-1]"
	fi
	COMPREPLY=()
	while read -r line; do
		if [[ -z $how ]]; then how=$line; continue; fi
		[[ $line == --*=* && $current == --*=* ]] && line=\${line#*=}
		COMPREPLY+=("$line")
	done < <("\${COMP_WORDS[0]}" __complete bash "=$current" "\${before[@]}" 2>/dev/null)
	if [[ $how == paths ]]; then
		COMPREPLY+=($(compgen -f -- "$shown"))
		# bash 3 has no compopt.
		compopt -o filenames 2>/dev/null
	fi
}
complete -F _arl_completion arl
`;

const ZSH = `#compdef arl
_arl() {
	local -a lines candidates
	lines=("\${(@f)$("$words[1]" __complete zsh "=$words[CURRENT]" "\${(@)words[2,CURRENT-1]}" 2>/dev/null)}")
	candidates=("\${(@)lines[2,-1]}")
	(( $#candidates )) && _describe arl candidates
	if [[ $lines[1] == paths ]]; then _files; fi
}
if [[ $funcstack[1] == _arl ]]; then _arl "$@"; else compdef _arl arl; fi
`;

const FISH = `# fish completion of arl
function __arl_completion
	set -l words (commandline -opc)
	set -l current (commandline -ct)
	set -l lines ($words[1] __complete fish "=$current" $words[2..-1] 2>/dev/null)
	for line in $lines[2..-1]
		echo $line
	end
	if test "$lines[1]" = paths
		__fish_complete_path "$current"
	end
end
complete -c arl -f -a '(__arl_completion)'
`;

const POWERSHELL = `# PowerShell completion of arl
Register-ArgumentCompleter -Native -CommandName arl -ScriptBlock {
	param($wordToComplete, $commandAst, $cursorPosition)
	$words = @($commandAst.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursorPosition } | ForEach-Object { $_.Extent.Text })
	$before = @($words | Select-Object -Skip 1)
	$lines = @(& $words[0] __complete powershell "=$wordToComplete" @before 2>$null)
	$lines | Select-Object -Skip 1 | ForEach-Object {
		$word, $about = $_ -split "\`t", 2
		if (-not $about) { $about = $word }
		[System.Management.Automation.CompletionResult]::new($word, $word, 'ParameterValue', $about)
	}
}
`;

/** The script of each shell. */
export const SCRIPTS: Readonly<Record<string, string>> = { bash: BASH, zsh: ZSH, fish: FISH, powershell: POWERSHELL };
